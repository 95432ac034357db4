"""Models by name: find, download, and convert them as they arrive."""
