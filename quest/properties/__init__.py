"""What the paper says of quantized diffusion models (arXiv:2402.03666, section 3), measured on a denoiser."""
