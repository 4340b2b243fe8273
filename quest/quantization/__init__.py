"""Quantizers, quantized layers and attention, their checkpoints, and what they cost. Knows no method."""
