"""Measurements of this machine: what `skyrun bench` runs."""
