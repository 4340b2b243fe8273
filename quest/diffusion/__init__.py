"""The models: how each is loaded, sampled and conditioned, and the trajectories that methods calibrate on."""
