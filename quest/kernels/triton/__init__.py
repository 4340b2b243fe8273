"""Integer layers and attention on a GPU, in Triton."""
