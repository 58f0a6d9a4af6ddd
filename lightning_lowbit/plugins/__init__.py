"""Where the low-bit network meets Lightning: life cycle, calibration, checkpoints, precision, order."""
