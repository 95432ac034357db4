"""Encode weights to block bytes, a family of types to a file."""
