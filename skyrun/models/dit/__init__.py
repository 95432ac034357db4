"""The Wan diffusion transformer, its blocks, and the order and the ranges in which tokens pass through them."""

from skyrun.models.dit.block import Context, Rope, dit_block, guided_away
from skyrun.models.dit.transformer import DiT

__all__ = ["Context", "DiT", "Rope", "dit_block", "guided_away"]
