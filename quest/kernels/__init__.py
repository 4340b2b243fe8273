"""Kernels: a module each with pack, linear, conv2d and attention. What they mean is `reference`."""
