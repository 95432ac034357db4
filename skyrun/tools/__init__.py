"""Tools for models and machines: calibrate, convert, bench, tune, doctor, inspect."""
