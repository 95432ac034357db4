"""What is to be made, in numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """A clip and the models that make it.

    height, width, frames: of the clip in pixels. latent_frames: frames that the transformer sees in its largest window,
    with those that stand beside the clip. windows: how often it denoises and decodes.
    weight_type: of most weights of the transformer's blocks, as GGUF names it. block_bytes and text_block_bytes: the
    largest block of the transformer and of the text encoder as stored. outer_bytes: what of the transformer is not in
    blocks. vae_weights: their number. image_layers, image_block_bytes: of a talking avatar's image encoder.
    context_tokens: that the clip attends to besides itself.
    """

    task: str
    height: int
    width: int
    frames: int
    latent_frames: int
    steps: int
    layers: int
    dim: int
    ffn_dim: int
    weight_type: str
    block_bytes: int
    outer_bytes: int
    text_layers: int
    text_dim: int
    text_block_bytes: int
    vae_base_dim: int
    vae_weights: int
    windows: int = 1
    image_layers: int = 0
    image_block_bytes: int = 0
    context_tokens: int = 512

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass: one for every 2 x 2 latents, each of 8 x 8 pixels."""
        return self.latent_frames * (self.height // 16) * (self.width // 16)
