"""Trains the small model that skyrun carries. Not part of the package."""
