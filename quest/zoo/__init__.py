"""Small latent diffusion models trained from scratch on procedural scenes, and everything that trained them."""
