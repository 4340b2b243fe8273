"""Measure on a denoiser what the paper claims about quantized diffusion models (arXiv:2402.03666, section 3)."""
