"""What is to be made, in numbers."""

from dataclasses import dataclass, replace

AREAS = (("540P", 544 * 960), ("480P", 480 * 848))  # smaller resolutions, with their pixels, largest first


@dataclass(frozen=True)
class Candidate:
    """A transformer file that there is or could be.

    weight_type: of most weights of its blocks, as GGUF names it. block_bytes: its largest block as stored.
    """

    weight_type: str
    block_bytes: int


@dataclass(frozen=True)
class Workload:
    """A clip and the models that make it.

    task: what it is called. height, width, frames: of the clip in pixels. latent_frames: frames that the transformer
    sees in its largest window, with those that stand beside the clip. windows: how often it denoises and decodes;
    windowed: a longer clip is made in more of them, not in larger ones. areas: resolutions to make it in instead.
    weight_type: of most weights of the transformer's blocks, as GGUF names it. block_bytes and text_block_bytes: the
    largest block of the transformer and of the text encoder as stored. outer_bytes: what of the transformer is not in
    blocks. vae_weights: their number. image_layers, image_block_bytes: of the tower that looks at pictures.
    token_matrices, context_matrices: square matrices in a block, of the model's width, beside those of two attentions
    and the feed-forward: that every token passes, and that only what it attends to passes.
    context_tokens: that the clip attends to besides itself. encoded_frames: that the autoencoder encodes in all;
    decoded_frames: that it decodes, 0: those of the clip. candidates: transformer files to choose from; where there are
    none, it is the one described here.
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
    image_block_bytes: int = 0
    image_layers: int = 0
    token_matrices: int = 0
    context_matrices: int = 0
    context_tokens: int = 512
    windowed: bool = False
    areas: tuple[tuple[str, int], ...] = AREAS
    encoded_frames: int = 4
    decoded_frames: int = 0
    candidates: tuple[Candidate, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass: one for every 2 x 2 latents, each of 8 x 8 pixels."""
        return self.latent_frames * (self.height // 16) * (self.width // 16)

    def offers(self) -> list["Workload"]:
        """The workload with each of the files that there are to choose from."""
        offered = self.candidates or (Candidate(self.weight_type, self.block_bytes),)
        return [
            replace(self, weight_type=one.weight_type, block_bytes=one.block_bytes, candidates=()) for one in offered
        ]
