"""A module for each command: call the engine or a tool, show what it says."""
