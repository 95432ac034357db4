"""The size of a clip and of the models that make it."""

from dataclasses import dataclass, replace

AREAS = (("540P", 544 * 960), ("480P", 480 * 848))  # smaller resolutions with their numbers of pixels, largest first


@dataclass(frozen=True)
class Candidate:
    """A transformer file that exists or could be made.

    weight_type: GGUF type of most weights in its blocks. block_bytes: bytes of its largest block as stored.
    """

    weight_type: str
    block_bytes: int


@dataclass(frozen=True)
class Workload:
    """The size of a clip and of the models that make it.

    task: name of the task. height, width: of the clip in pixels. frames: of the clip.
    latent_frames: that the transformer sees in its largest window, conditioning frames included.
    steps: denoising steps of a window. layers, dim, ffn_dim: of the transformer.
    weight_type: GGUF type of most weights in the transformer's blocks. block_bytes, text_block_bytes: the largest block
    of the transformer and of the text encoder, as stored. outer_bytes: the transformer's weights outside of blocks.
    text_layers, text_dim: of the text encoder. vae_base_dim: the VAE's narrowest width. vae_weights: how many weights
    the VAE has. windows: how many windows are denoised and decoded. image_layers, image_block_bytes: of the image
    encoder.
    token_matrices, context_matrices: matrices [dim, dim] of a block, beside two attentions and the feed-forward, that
    are applied to all tokens or to the context only. context_tokens: that every token attends to by cross-attention.
    contexts: how many of these a step has, each with tokens of its own: two with classifier-free guidance.
    avoided_tokens: of a further text that the tokens of the first context see too, with normalized attention guidance.
    windowed: whether a longer clip takes more windows instead of larger ones. areas: smaller resolutions that could be
    made instead. encoded_frames: that the VAE encodes in all. stills: whether it encodes them one by one, as images.
    decoded_frames: that it decodes; 0 stands for `frames`.
    candidates: transformer files to choose from; without any, it is the one described here.
    adapter_weights: that adapters add to a block, whose bytes are part of block_bytes. adapter_rank: of all together.
    devices: among how many devices the tokens are divided. machines: among how many machines these are, each of which
    has a disk.
    density: the share of its tiles that self-attention read in an earlier run of this kind; 0: not known.
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
    contexts: int = 1
    avoided_tokens: int = 0
    windowed: bool = False
    areas: tuple[tuple[str, int], ...] = AREAS
    encoded_frames: int = 4
    stills: bool = False
    decoded_frames: int = 0
    candidates: tuple[Candidate, ...] = ()
    adapter_weights: int = 0
    adapter_rank: int = 0
    devices: int = 1
    machines: int = 1
    density: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass: one for each patch of 2 x 2 latents, which stand for 8 x 8 pixels each."""
        return self.latent_frames * (self.height // 16) * (self.width // 16)

    @property
    def own_tokens(self) -> int:
        """Tokens that one device has."""
        return -(-self.tokens // self.devices)

    @property
    def readers(self) -> int:
        """How many devices read from one disk, and may read shares of blocks."""
        return -(-self.devices // self.machines)

    def offers(self) -> list["Workload"]:
        """The workload with each of the candidate files."""
        offered = self.candidates or (Candidate(self.weight_type, self.block_bytes),)
        return [
            replace(self, weight_type=one.weight_type, block_bytes=one.block_bytes, candidates=()) for one in offered
        ]
