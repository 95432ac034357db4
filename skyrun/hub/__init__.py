"""Find models by name, download them, and convert them while they arrive."""
