"""Services that every job shares and that know no models: files, hashes, downloads, GPU lock, resuming, provenance."""
