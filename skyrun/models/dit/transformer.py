"""The Wan diffusion transformer: predicts the velocity from noisy latents, timesteps and context.

Weights have original Wan names. A block is a function of activations and of streamed weights.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.events import Event
from skyrun.kernels.elementwise import layer_norm
from skyrun.kernels.files.adapter import Fitted
from skyrun.kernels.files.gguf_file import GGUFFile
from skyrun.models.audio_projection import project_audio
from skyrun.models.dit.block import Context, Rope, dit_block
from skyrun.models.dit.spans import Span, TimeEmbedding, chunks, divide, hearing
from skyrun.models.dit.sparse import SelfCheck
from skyrun.models.dit.tile_order import TileOrder
from skyrun.models.dit_header import HEAD_DIM, canonical_tensors, read_dims
from skyrun.models.rope import rope_table, sinusoid
from skyrun.models.umt5 import TEXT_LENGTH
from skyrun.parallel.attention import SharedAttention
from skyrun.parallel.group import here
from skyrun.streaming.stream import BlockStream
from skyrun.streaming.tokens import HeldTokens, ParkedTokens, Tokens
from skyrun.streaming.weights import load_additions, load_weights

_SLOW = 16  # frames per second that the first of two embeddings of frame rates stands for; the other: 24
_IMAGE_EPS = 1e-5  # of the norms around the image projection


class DiT:
    """The part of a transformer that stays in memory: all weights outside of its blocks.

    rows: how many tokens pass through a block at a time; None stands for all. parked: whether tokens wait on the host
    between blocks. adapters: what they add to these weights is loaded too.
    """

    def __init__(
        self,
        file: GGUFFile,
        device: torch.device,
        dtype: torch.dtype,
        *,
        rows: int | None = None,
        parked: bool = False,
        adapters: Sequence[Fitted] = (),
    ) -> None:
        self.dims = read_dims(file)
        self.device, self.dtype = device, dtype
        self._rows, self._parked = rows, parked
        tensors = canonical_tensors(file)
        outer = {name: info for name, info in tensors.items() if not name.startswith("blocks.")}
        self._outer = load_weights(file, outer, device, load_additions(adapters, "blocks.", device))

    def embed_text(self, text: Tensor) -> Tensor:
        """Project a text embedding float32 [n, text_dim], n <= 512 -> context [512, D].

        It is padded by zeros, which are not masked: the model was trained to attend to their projections.
        """
        text = F.pad(text.to(self.device, self.dtype), (0, 0, 0, TEXT_LENGTH - len(text)))
        hidden = F.gelu(self._outer.linear("text_embedding.0", text), approximate="tanh")
        return self._outer.linear("text_embedding.2", hidden)

    def embed_image(self, tokens: Tensor) -> Tensor:
        """Project tokens of an image [n, image_dim] -> context [n, D]."""

        def norm(name: str, x: Tensor) -> Tensor:
            weight, bias = self._outer.dense(f"{name}.weight"), self._outer.dense(f"{name}.bias")
            normed = layer_norm(x, weight, bias, _IMAGE_EPS)
            assert isinstance(normed, Tensor)
            return normed

        hidden = norm("img_emb.proj.0", tokens.to(self.device, self.dtype))
        hidden = F.gelu(self._outer.linear("img_emb.proj.1", hidden))
        return norm("img_emb.proj.4", self._outer.linear("img_emb.proj.3", hidden))

    def embed_audio(self, windows: Tensor) -> Tensor:
        """Project windows of speech features [1 + 4 (F - 1), window, layers, channels] -> [F, n, audio_dim]."""
        return project_audio(self._outer, windows.to(self.device, self.dtype), self.dims.context_tokens)

    def embed_times(self, timesteps: Sequence[float], fps: int | None = None) -> list[TimeEmbedding]:
        """One embedding per timestep, all in one call: the projection is the largest matrix outside of the blocks.

        fps: the frame rate of the clip, for a transformer that is told.
        """
        waves = sinusoid(torch.tensor(timesteps, dtype=torch.float32, device=self.device), self.dims.freq_dim)
        times = self._outer.linear("time_embedding.2", F.silu(self._outer.linear("time_embedding.0", waves)))
        projections = self._outer.linear("time_projection.1", F.silu(times))
        if self.dims.rates and fps is not None:
            rate = self._outer.dense("fps_embedding.weight")[0 if fps == _SLOW else 1]
            hidden = F.silu(self._outer.linear("fps_projection.0", rate))
            projections = projections + self._outer.linear("fps_projection.2", hidden)
        return list(zip(times, projections.view(-1, 6, self.dims.dim), strict=True))

    def rope(self, latents: Tensor, positions: Sequence[int] | None = None) -> Rope:
        """The rotary table of latents [C, F, h, w]. positions: of the frames in time, by default 0 to F - 1."""
        _, frames, height, width = latents.shape
        return rope_table(positions or range(frames), height // 2, width // 2, HEAD_DIM, self.device)

    def forward(
        self,
        stream: BlockStream,
        latents: Tensor,
        times: Sequence[TimeEmbedding],
        context: Context,
        rope: Rope,
        order: TileOrder | None = None,
    ) -> Generator[Event, None, Tensor]:
        """Predict the velocity, float32 [out, F, h, w]. Yields an event after every block.

        Args:
            stream: the transformer's blocks.
            latents: [C, F, h, w].
            times: a time embedding for each of the F frames.
            context: what the tokens attend to by cross-attention.
            rope: the rotary table of the latents, in the order of the tokens.
            order: of the tokens; None leaves them in frame, row, column order.
        """
        (velocity,) = yield from self.velocities(stream, latents, times, [context], rope, order)
        return velocity

    def velocities(
        self,
        stream: BlockStream,
        latents: Tensor,
        times: Sequence[TimeEmbedding],
        contexts: list[Context],
        rope: Rope,
        order: TileOrder | None = None,
        check: SelfCheck | None = None,
    ) -> Generator[Event, None, list[Tensor]]:
        """As `forward`, for several contexts: the velocity with each. Every block is read once for all of them.

        check: decides what self-attention skips; None skips nothing. With several devices there is none.
        """
        _, frames, height, width = latents.shape
        shape = frames * (height // 2) * (width // 2), self.dims.dim
        tokens, group = ParkedTokens if self._parked else HeldTokens, here()
        shares = group.shares(shape[0])
        own = shares[group.rank]
        rows = check.whole_tiles(self._rows) if check else self._rows
        spans_of = [list(divide(times, shape[0] // frames, rows, share)) for share in shares]
        if contexts[0].audio is not None:
            spans_of[group.rank] = [hearing(s, shape[0] // frames, order, self.device) for s in spans_of[group.rank]]
        spans = spans_of[group.rank]
        shared = SharedAttention(group, spans_of, self.dims.dim, self.dims.heads) if group.size > 1 else None
        with ExitStack() as stack:
            held = [stack.enter_context(closing(tokens(shape, self.dtype, self.device, own))) for _ in contexts]
            for x in held:
                self._patchify(latents, x, own, order)
            for weights, clock in stream.blocks():
                for number, (x, context) in enumerate(zip(held, contexts, strict=True)):
                    attention = shared if check is None else check.block(number, clock.index)
                    dit_block(x, weights, spans, context, rope, self.dims, attention)
                yield clock.done()
            counts = [share.stop - share.start for share in shares]
            patches = [group.gathered(self._head(x, spans), counts) for x in held]
            patches = patches if order is None else [order.restored(part) for part in patches]
        whole = [part.view(frames, height // 2, width // 2, 2, 2, -1) for part in patches]
        return [part.permute(5, 0, 1, 3, 2, 4).reshape(-1, frames, height, width) for part in whole]

    def _patchify(self, latents: Tensor, x: Tokens, own: slice, order: TileOrder | None) -> None:
        """Latents [C, F, h, w] -> tokens [F * h/2 * w/2, D], of which only the own ones are computed.

        The patch convolution is computed as one matmul.
        """
        channels, frames, height, width = latents.shape
        patches = latents.view(channels, frames, height // 2, 2, width // 2, 2).permute(1, 2, 4, 0, 3, 5)
        patches = patches.reshape(-1, channels * 4).to(self.device, self.dtype)
        patches = patches if order is None else order.arranged(patches)
        weight = self._outer.dense("patch_embedding.weight", self.dtype).flatten(1)
        bias = self._outer.dense("patch_embedding.bias", self.dtype)
        for part in chunks(own.start, own.stop, self._rows):
            x.store(part, F.linear(patches[part], weight, bias))

    def _head(self, x: Tokens, spans: Sequence[Span]) -> Tensor:
        """Tokens of the spans -> patches, float32 [n, 4 * out_channels]."""
        modulation = self._outer.dense("head.modulation").view(2, -1)
        patches = [torch.empty(0, 4 * self.dims.out_channels, device=self.device)]
        for span in spans:
            shift, scale = modulation + span.time[0]
            normed = layer_norm(x.fetch(span.rows), 1 + scale, shift, self.dims.eps)
            patches.append(self._outer.linear("head.head", normed).float())
        return torch.cat(patches)
