"""Tensor names of the published checkpoints, the names GGUF uses for them, and the shapes they must have.

One table per family; a table lists every tensor, so it renames, and finds what is missing, unknown or misshapen.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from skyrun.kernels.errors import SkyrunError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor: its name in the checkpoint, its name in the file written, its shape in terms of the model's dims.

    `{n}` in both names is the block's index. shape: words such as "6*dim dim".
    """

    source: str
    target: str
    shape: str

    def for_block(self, index: int) -> "Entry":
        return Entry(self.source.replace("{n}", str(index)), self.target.replace("{n}", str(index)), self.shape)

    def sizes(self, dims: Mapping[str, int]) -> Shape:
        return tuple(prod(int(f) if f.isdigit() else dims[f] for f in word.split("*")) for word in self.shape.split())


def _layer(source: str, target: str, shape: str) -> list[Entry]:
    """Weight and bias of a linear layer or a convolution."""
    rows = shape.split()[0]
    return [
        Entry(f"{source}.weight", f"{target}.weight", shape),
        Entry(f"{source}.bias", f"{target}.bias", rows),
    ]


def _attention(source: str, target: str) -> list[Entry]:
    names = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    entries = [e for theirs, ours in names for e in _layer(f"{source}.{theirs}", f"{target}.{ours}", "dim dim")]
    norms = [Entry(f"{source}.{norm}.weight", f"{target}.{norm}.weight", "dim") for norm in ("norm_q", "norm_k")]
    return entries + norms


# Reference-to-video transformer: diffusers names -> original Wan names. Diffusers' norm2 is Wan's norm3 (the one with
# weights, before cross-attention); Wan's norm1 and norm2 have none.
R2V_TRANSFORMER = [
    Entry("patch_embedding.weight", "patch_embedding.weight", "dim in 1 2 2"),
    Entry("patch_embedding.bias", "patch_embedding.bias", "dim"),
    *_layer("condition_embedder.text_embedder.linear_1", "text_embedding.0", "dim text"),
    *_layer("condition_embedder.text_embedder.linear_2", "text_embedding.2", "dim dim"),
    *_layer("condition_embedder.time_embedder.linear_1", "time_embedding.0", "dim freq"),
    *_layer("condition_embedder.time_embedder.linear_2", "time_embedding.2", "dim dim"),
    *_layer("condition_embedder.time_proj", "time_projection.1", "6*dim dim"),
    Entry("blocks.{n}.scale_shift_table", "blocks.{n}.modulation", "1 6 dim"),
    *_attention("blocks.{n}.attn1", "blocks.{n}.self_attn"),
    Entry("blocks.{n}.norm2.weight", "blocks.{n}.norm3.weight", "dim"),
    Entry("blocks.{n}.norm2.bias", "blocks.{n}.norm3.bias", "dim"),
    *_attention("blocks.{n}.attn2", "blocks.{n}.cross_attn"),
    *_layer("blocks.{n}.ffn.net.0.proj", "blocks.{n}.ffn.0", "ffn dim"),
    *_layer("blocks.{n}.ffn.net.2", "blocks.{n}.ffn.2", "dim ffn"),
    Entry("scale_shift_table", "head.modulation", "1 2 dim"),
    *_layer("proj_out", "head.head", "out*4 dim"),
]

# UMT5 encoder: transformers names -> the names of GGUF's t5encoder architecture.
UMT5_ENCODER = [
    Entry("shared.weight", "token_embd.weight", "vocab dim"),
    Entry("encoder.block.{n}.layer.0.layer_norm.weight", "enc.blk.{n}.attn_norm.weight", "dim"),
    Entry("encoder.block.{n}.layer.0.SelfAttention.q.weight", "enc.blk.{n}.attn_q.weight", "inner dim"),
    Entry("encoder.block.{n}.layer.0.SelfAttention.k.weight", "enc.blk.{n}.attn_k.weight", "inner dim"),
    Entry("encoder.block.{n}.layer.0.SelfAttention.v.weight", "enc.blk.{n}.attn_v.weight", "inner dim"),
    Entry("encoder.block.{n}.layer.0.SelfAttention.o.weight", "enc.blk.{n}.attn_o.weight", "dim inner"),
    Entry(
        "encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias.weight",
        "enc.blk.{n}.attn_rel_b.weight",
        "buckets heads",
    ),
    Entry("encoder.block.{n}.layer.1.layer_norm.weight", "enc.blk.{n}.ffn_norm.weight", "dim"),
    Entry("encoder.block.{n}.layer.1.DenseReluDense.wi_0.weight", "enc.blk.{n}.ffn_gate.weight", "ffn dim"),
    Entry("encoder.block.{n}.layer.1.DenseReluDense.wi_1.weight", "enc.blk.{n}.ffn_up.weight", "ffn dim"),
    Entry("encoder.block.{n}.layer.1.DenseReluDense.wo.weight", "enc.blk.{n}.ffn_down.weight", "dim ffn"),
    Entry("encoder.final_layer_norm.weight", "enc.output_norm.weight", "dim"),
]


def _residual(source: str, target: str, channels: tuple[str, str]) -> list[Entry]:
    before, after = channels
    entries = [
        Entry(f"{source}.norm1.gamma", f"{target}.residual.0.gamma", f"{before} 1 1 1"),
        *_layer(f"{source}.conv1", f"{target}.residual.2", f"{after} {before} 3 3 3"),
        Entry(f"{source}.norm2.gamma", f"{target}.residual.3.gamma", f"{after} 1 1 1"),
        *_layer(f"{source}.conv2", f"{target}.residual.6", f"{after} {after} 3 3 3"),
    ]
    if before != after:
        entries += _layer(f"{source}.conv_shortcut", f"{target}.shortcut", f"{after} {before} 1 1 1")
    return entries


def _middle(source: str, target: str) -> list[Entry]:
    c = "4*base"
    return [
        *_residual(f"{source}.resnets.0", f"{target}.0", (c, c)),
        Entry(f"{source}.attentions.0.norm.gamma", f"{target}.1.norm.gamma", f"{c} 1 1"),
        *_layer(f"{source}.attentions.0.to_qkv", f"{target}.1.to_qkv", f"3*{c} {c} 1 1"),
        *_layer(f"{source}.attentions.0.proj", f"{target}.1.proj", f"{c} {c} 1 1"),
        *_residual(f"{source}.resnets.1", f"{target}.2", (c, c)),
    ]


def _vae_encoder() -> list[Entry]:
    entries = _layer("encoder.conv_in", "encoder.conv1", "base 3 3 3 3")
    width, index = "base", 0
    for level, wider in enumerate(("base", "2*base", "4*base", "4*base")):
        for _ in range(2):
            name = f"encoder.down_blocks.{index}", f"encoder.downsamples.{index}"
            entries += _residual(*name, (width, wider))
            width, index = wider, index + 1
        if level < 3:
            source, target = f"encoder.down_blocks.{index}", f"encoder.downsamples.{index}"
            entries += _layer(f"{source}.resample.1", f"{target}.resample.1", f"{width} {width} 3 3")
            if level > 0:  # the first level halves space only, the others time too
                entries += _layer(f"{source}.time_conv", f"{target}.time_conv", f"{width} {width} 3 1 1")
            index += 1
    entries += _middle("encoder.mid_block", "encoder.middle")
    entries.append(Entry("encoder.norm_out.gamma", "encoder.head.0.gamma", "4*base 1 1 1"))
    return entries + _layer("encoder.conv_out", "encoder.head.2", "2*z 4*base 3 3 3")


def _vae_decoder() -> list[Entry]:
    entries = _layer("decoder.conv_in", "decoder.conv1", "4*base z 3 3 3") + _middle(
        "decoder.mid_block", "decoder.middle"
    )
    width, index = "4*base", 0
    for level, (wider, halved) in enumerate(
        (("4*base", "2*base"), ("4*base", "2*base"), ("2*base", "base"), ("base", ""))
    ):
        for layer in range(3):
            name = f"decoder.up_blocks.{level}.resnets.{layer}", f"decoder.upsamples.{index}"
            entries += _residual(*name, (width, wider))
            width, index = wider, index + 1
        if halved:  # every level but the last doubles space and halves the channels; the first two double time too
            source, target = f"decoder.up_blocks.{level}.upsamplers.0", f"decoder.upsamples.{index}"
            entries += _layer(f"{source}.resample.1", f"{target}.resample.1", f"{halved} {wider} 3 3")
            if level < 2:
                entries += _layer(f"{source}.time_conv", f"{target}.time_conv", f"2*{wider} {wider} 3 1 1")
            width, index = halved, index + 1
    entries.append(Entry("decoder.norm_out.gamma", "decoder.head.0.gamma", "base 1 1 1"))
    return entries + _layer("decoder.conv_out", "decoder.head.2", "3 base 3 3 3")


# Wan video autoencoder: diffusers names -> original Wan names.
WAN_VAE = [
    *_vae_encoder(),
    *_layer("quant_conv", "conv1", "2*z 2*z 1 1 1"),
    *_layer("post_quant_conv", "conv2", "z z 1 1 1"),
    *_vae_decoder(),
]

# Leftovers of training that no forward pass reads.
_IGNORED = re.compile(r"blocks\.\d+\.attn\d\.norm_added_[qk]\.weight|encoder\.embed_tokens\.weight")


def expand(table: list[Entry], layers: int) -> list[Entry]:
    """The table with its block rows repeated for every block, in execution order: before, blocks, after."""
    block = [entry for entry in table if "{n}" in entry.source]
    if not block:
        return table
    first = table.index(block[0])
    plain = [entry for entry in table if "{n}" not in entry.source]
    blocks = [entry.for_block(index) for index in range(layers) for entry in block]
    return plain[:first] + blocks + plain[first:]


def match(what: str, table: list[Entry], dims: Mapping[str, int], found: Mapping[str, Shape]) -> list[Entry]:
    """Check `found` (name -> shape) against the table and return its rows in the order they are written.

    Raises SkyrunError that lists every missing, unknown and misshapen tensor at once.
    """
    entries = expand(table, dims.get("layers", 0))
    problems = []
    for entry in entries:
        expected = entry.sizes(dims)
        if entry.source not in found:
            problems.append(f"{entry.source} is missing (expected shape {list(expected)})")
        elif found[entry.source] != expected:
            problems.append(f"{entry.source} has shape {list(found[entry.source])}, expected {list(expected)}")
    known = {entry.source for entry in entries}
    problems += [
        f"{name} {list(found[name])} is not a tensor of this model"
        for name in sorted(found)
        if name not in known and not _IGNORED.fullmatch(name)
    ]
    if problems:
        hint = "download the checkpoint again, or check that it is a SkyReels-V3 R2V repository"
        raise SkyrunError.listing(f"{what} does not match its model", problems, hint)
    return entries
