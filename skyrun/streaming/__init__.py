"""Stream the weights of a model file to a device, block by block."""
