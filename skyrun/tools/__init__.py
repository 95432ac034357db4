"""What helps to use and understand models and machines: calibrate, bench, tune, doctor, inspect."""
