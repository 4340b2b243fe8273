"""Small latent diffusion models trained from scratch on procedural scenes, and everything that trained them."""

from pathlib import Path

ZOO = Path(__file__).resolve().parents[2] / "resources" / "zoo"
