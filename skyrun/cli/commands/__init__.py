"""A module for each command, which calls the engine or a tool and shows its events."""
