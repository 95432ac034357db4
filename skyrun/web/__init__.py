"""The page on one's own machine: HTTP, a queue on disk, a process for each clip. It imports engine and planning."""

from skyrun.web.command import execute

__all__ = ["execute"]
