"""What every job needs, whatever the model: files, hashes, downloads, the lock of a GPU, resuming, provenance."""
