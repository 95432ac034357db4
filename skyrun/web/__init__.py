"""The page on one's own machine: HTTP, a queue on disk, a process for each clip. It imports engine and planning."""
