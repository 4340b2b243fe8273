"""Integer layers, attention and fused blocks on a CPU, computed by the compiled core in `csrc`."""
