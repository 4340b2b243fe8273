"""Training of the suite's own small latent diffusion models, on procedural scenes, emoji and photographs."""
