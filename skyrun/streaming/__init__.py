"""Bytes of a model file become weights on a device, block by block."""
