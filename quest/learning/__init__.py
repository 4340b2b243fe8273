"""What methods learn with: ranges from calibration rows, rounding, reconstruction block by block, alignment."""
