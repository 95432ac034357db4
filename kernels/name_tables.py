"""The model families: every tensor of the published models with its shape and its name in every naming in use."""

from collections.abc import Collection
from dataclasses import replace

from skyrun.kernels.files.names import Row, Table, recognise


def _layer(shape: str, *names: str) -> list[Row]:
    """Weight and bias of a linear layer or a convolution or, if the shape has one axis only, of an affine norm."""
    bias = shape.split()[0]
    return [
        Row(shape, tuple(f"{name}.weight" for name in names)),
        Row(bias, tuple(f"{name}.bias" for name in names)),
    ]


def _attention(original: str, diffusers: str) -> list[Row]:
    parts = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    rows = [row for ours, theirs in parts for row in _layer("dim dim", f"{original}.{ours}", f"{diffusers}.{theirs}")]
    norms = [Row("dim", (f"{original}.{norm}.weight", f"{diffusers}.{norm}.weight")) for norm in ("norm_q", "norm_k")]
    return rows + norms


_BEFORE = [
    *_layer("dim in 1 2 2", "patch_embedding", "patch_embedding"),
    *_layer("dim text", "text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    *_layer("dim dim", "text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    *_layer("dim freq", "time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    *_layer("dim dim", "time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    *_layer("6*dim dim", "time_projection.1", "condition_embedder.time_proj"),
]
# Diffusers' norm2 is Wan's norm3 (the one with weights, before cross-attention); Wan's norm1 and norm2 have none.
_ATTENTION = [
    Row("1 6 dim", ("blocks.{n}.modulation", "blocks.{n}.scale_shift_table")),
    *_attention("blocks.{n}.self_attn", "blocks.{n}.attn1"),
    *_layer("dim", "blocks.{n}.norm3", "blocks.{n}.norm2"),
    *_attention("blocks.{n}.cross_attn", "blocks.{n}.attn2"),
]
_FEED_FORWARD = [
    *_layer("ffn dim", "blocks.{n}.ffn.0", "blocks.{n}.ffn.net.0.proj"),
    *_layer("dim ffn", "blocks.{n}.ffn.2", "blocks.{n}.ffn.net.2"),
]
_AFTER = [
    Row("1 2 dim", ("head.modulation", "scale_shift_table")),
    *_layer("4*out dim", "head.head", "proj_out"),
]

# The text-conditioned Wan transformer: reference-to-video, video extension, shot switching.
WAN_TRANSFORMER = Table(
    "transformer",
    ("original", "diffusers"),
    (*_BEFORE, *_ATTENTION, *_FEED_FORWARD, *_AFTER),
    ignored=r"blocks\.\d+\.attn\d\.norm_added_[qk]\.weight",
    tasks=("r2v", "v2v", "shot", "t2v"),
    needs=("text_encoder", "vae"),
)

# The small one of SkyReels-V2's models for diffusion forcing: it is told one of two frame rates.
WAN_RATE_TRANSFORMER = Table(
    "transformer",
    ("original", "diffusers"),
    (
        *_BEFORE,
        Row("rates dim", ("fps_embedding.weight", "fps_embedding.weight")),
        *_layer("dim dim", "fps_projection.0", "fps_projection.net.0.proj"),
        *_layer("6*dim dim", "fps_projection.2", "fps_projection.net.2"),
        *_ATTENTION,
        *_FEED_FORWARD,
        *_AFTER,
    ),
    ignored=WAN_TRANSFORMER.ignored,
    tasks=("t2v",),
    needs=WAN_TRANSFORMER.needs,
)

# Wan's image to video: every token also attends to tokens of the image.
_IMAGE = [
    *_layer("image", "img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    *_layer("image image", "img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    *_layer("dim image", "img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    *_layer("dim", "img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
]
_IMAGE_ATTENTION = [
    *_layer("dim dim", "blocks.{n}.cross_attn.k_img", "blocks.{n}.attn2.add_k_proj"),
    *_layer("dim dim", "blocks.{n}.cross_attn.v_img", "blocks.{n}.attn2.add_v_proj"),
    Row("dim", ("blocks.{n}.cross_attn.norm_k_img.weight", "blocks.{n}.attn2.norm_added_k.weight")),
]
WAN_IMAGE_TRANSFORMER = Table(
    "transformer",
    ("original", "diffusers"),
    (*_BEFORE, *_IMAGE, *_ATTENTION, *_IMAGE_ATTENTION, *_FEED_FORWARD, *_AFTER),
    ignored=r"blocks\.\d+\.attn\d\.norm_added_q\.weight",
    tasks=("i2v",),
    needs=("text_encoder", "vae", "image_encoder"),
)

# The talking-avatar transformer: image tokens as in Wan's image-to-video, audio tokens per latent frame.
# The first latent frame sees audio_window frames of audio_features (layers * channels) values, each later one sees
# middle_window frames.
WAN_AUDIO_TRANSFORMER = Table(
    "transformer",
    ("original",),
    (
        *_BEFORE,
        *_IMAGE,
        *_layer("audio_hidden audio_window*audio_features", "audio_proj.proj1"),
        *_layer("audio_hidden middle_window*audio_features", "audio_proj.proj1_vf"),
        *_layer("audio_hidden audio_hidden", "audio_proj.proj2"),
        *_layer("context_tokens*audio_dim audio_hidden", "audio_proj.proj3"),
        *_layer("audio_dim", "audio_proj.norm"),
        *_ATTENTION,
        *_IMAGE_ATTENTION,
        *_layer("dim dim", "blocks.{n}.audio_cross_attn.q_linear"),
        *_layer("2*dim audio_dim", "blocks.{n}.audio_cross_attn.kv_linear"),
        *_layer("dim dim", "blocks.{n}.audio_cross_attn.proj"),
        *_layer("dim", "blocks.{n}.norm_x"),
        *_FEED_FORWARD,
        *_AFTER,
    ),
    tasks=("a2v",),
    needs=("text_encoder", "vae", "image_encoder", "audio_encoder"),
)

TRANSFORMERS = (WAN_TRANSFORMER, WAN_RATE_TRANSFORMER, WAN_IMAGE_TRANSFORMER, WAN_AUDIO_TRANSFORMER)
TASKS = tuple(dict.fromkeys(task for table in TRANSFORMERS for task in table.tasks))
# Tasks whose tensors are the same are told apart by the class in the config of the diffusers layout, and by the folder
# in the repository that has two transformers.
CLASS_TASKS = {
    "SkyReelsC1WanI2v3DModel": "r2v",
    "SkyReelsA2WanI2v3DModel": "r2v",
    "WanTransformer3DModel": "t2v",
    "SkyReelsV2Transformer3DModel": "t2v",
}
FOLDER_TASKS = {"transformer": "v2v", "shot_transformer": "shot"}


def needed_roles(task: str) -> tuple[str, ...]:
    """Roles of the models that a task needs beside its transformer; for an unknown task those that all tasks need."""
    return next((table.needs for table in TRANSFORMERS if task in table.tasks), WAN_TRANSFORMER.needs)


def _umt5_block() -> list[Row]:
    ours, first, second, original = (
        "enc.blk.{n}",
        "encoder.block.{n}.layer.0",
        "encoder.block.{n}.layer.1",
        "blocks.{n}",
    )
    rows = [Row("dim", (f"{ours}.attn_norm.weight", f"{first}.layer_norm.weight", f"{original}.norm1.weight"))]
    for part in "qkvo":
        shape = "dim inner" if part == "o" else "inner dim"
        names = f"{ours}.attn_{part}.weight", f"{first}.SelfAttention.{part}.weight", f"{original}.attn.{part}.weight"
        rows.append(Row(shape, names))
    bias = f"{ours}.attn_rel_b.weight", f"{first}.SelfAttention.relative_attention_bias.weight"
    rows.append(Row("buckets heads", (*bias, f"{original}.pos_embedding.embedding.weight")))
    rows.append(Row("dim", (f"{ours}.ffn_norm.weight", f"{second}.layer_norm.weight", f"{original}.norm2.weight")))
    parts = (
        ("ffn dim", "ffn_gate", "wi_0", "ffn.gate.0"),
        ("ffn dim", "ffn_up", "wi_1", "ffn.fc1"),
        ("dim ffn", "ffn_down", "wo", "ffn.fc2"),
    )
    for shape, gguf, transformers, wan in parts:
        names = f"{ours}.{gguf}.weight", f"{second}.DenseReluDense.{transformers}.weight", f"{original}.{wan}.weight"
        rows.append(Row(shape, names))
    return [Row(row.shape, (*row.names, row.names[1])) for row in rows]


# The UMT5 encoder. "tied" names files that kept the shared embedding only under the encoder's name for it.
UMT5_ENCODER = Table(
    "text_encoder",
    ("gguf", "transformers", "original", "tied"),
    (
        Row(
            "vocab dim",
            ("token_embd.weight", "shared.weight", "token_embedding.weight", "encoder.embed_tokens.weight"),
        ),
        *_umt5_block(),
        Row(
            "dim",
            (
                "enc.output_norm.weight",
                "encoder.final_layer_norm.weight",
                "norm.weight",
                "encoder.final_layer_norm.weight",
            ),
        ),
    ),
    ignored=r"encoder\.embed_tokens\.weight|decoder\..*|lm_head\.weight|dec\..*|output\.weight|spiece_model",
)


def _residual(channels: tuple[str, str], original: str, diffusers: str) -> list[Row]:
    before, after = channels
    rows = [
        Row(f"{before} 1 1 1", (f"{original}.residual.0.gamma", f"{diffusers}.norm1.gamma")),
        *_layer(f"{after} {before} 3 3 3", f"{original}.residual.2", f"{diffusers}.conv1"),
        Row(f"{after} 1 1 1", (f"{original}.residual.3.gamma", f"{diffusers}.norm2.gamma")),
        *_layer(f"{after} {after} 3 3 3", f"{original}.residual.6", f"{diffusers}.conv2"),
    ]
    if before != after:
        rows += _layer(f"{after} {before} 1 1 1", f"{original}.shortcut", f"{diffusers}.conv_shortcut")
    return rows


def _middle(half: str) -> list[Row]:
    original, diffusers, c = f"{half}.middle", f"{half}.mid_block", "4*base"
    return [
        *_residual((c, c), f"{original}.0", f"{diffusers}.resnets.0"),
        Row(f"{c} 1 1", (f"{original}.1.norm.gamma", f"{diffusers}.attentions.0.norm.gamma")),
        *_layer(f"3*{c} {c} 1 1", f"{original}.1.to_qkv", f"{diffusers}.attentions.0.to_qkv"),
        *_layer(f"{c} {c} 1 1", f"{original}.1.proj", f"{diffusers}.attentions.0.proj"),
        *_residual((c, c), f"{original}.2", f"{diffusers}.resnets.1"),
    ]


def _vae_encoder() -> list[Row]:
    rows = _layer("base 3 3 3 3", "encoder.conv1", "encoder.conv_in")
    width, index = "base", 0
    for level, wider in enumerate(("base", "2*base", "4*base", "4*base")):
        for _ in range(2):
            rows += _residual((width, wider), f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}")
            width, index = wider, index + 1
        if level < 3:
            original, diffusers = f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}"
            rows += _layer(f"{width} {width} 3 3", f"{original}.resample.1", f"{diffusers}.resample.1")
            if level > 0:  # the first level halves space only, the others also halve time
                rows += _layer(f"{width} {width} 3 1 1", f"{original}.time_conv", f"{diffusers}.time_conv")
            index += 1
    rows += _middle("encoder")
    rows.append(Row("4*base 1 1 1", ("encoder.head.0.gamma", "encoder.norm_out.gamma")))
    return rows + _layer("2*z 4*base 3 3 3", "encoder.head.2", "encoder.conv_out")


def _vae_decoder() -> list[Row]:
    rows = _layer("4*base z 3 3 3", "decoder.conv1", "decoder.conv_in") + _middle("decoder")
    width, index = "4*base", 0
    levels = (("4*base", "2*base"), ("4*base", "2*base"), ("2*base", "base"), ("base", ""))
    for level, (wider, halved) in enumerate(levels):
        for layer in range(3):
            names = f"decoder.upsamples.{index}", f"decoder.up_blocks.{level}.resnets.{layer}"
            rows += _residual((width, wider), *names)
            width, index = wider, index + 1
        if halved:  # every level but the last doubles space and halves the channels; the first two also double time
            original, diffusers = f"decoder.upsamples.{index}", f"decoder.up_blocks.{level}.upsamplers.0"
            rows += _layer(f"{halved} {wider} 3 3", f"{original}.resample.1", f"{diffusers}.resample.1")
            if level < 2:
                rows += _layer(f"2*{wider} {wider} 3 1 1", f"{original}.time_conv", f"{diffusers}.time_conv")
            width, index = halved, index + 1
    rows.append(Row("base 1 1 1", ("decoder.head.0.gamma", "decoder.norm_out.gamma")))
    return rows + _layer("3 base 3 3 3", "decoder.head.2", "decoder.conv_out")


# The VAE of Wan 2.1.
WAN_VAE = Table(
    "vae",
    ("original", "diffusers"),
    (
        *_vae_encoder(),
        *_layer("2*z 2*z 1 1 1", "conv1", "quant_conv"),
        *_layer("z z 1 1 1", "conv2", "post_quant_conv"),
        *_vae_decoder(),
    ),
)

_VISION, _LAYER = "vision_model", "vision_model.encoder.layers.{n}"
# The vision tower of CLIP ViT-H/14; its file may hold the text tower too. Transformers stores q, k and v separately and
# the projection transposed: the readers of that layout convert them to the layout of this table.
_CLIP_ROWS = (
    Row("dim", ("v.class_embd", "visual.cls_embedding", f"{_VISION}.embeddings.class_embedding")),
    Row(
        "dim 3 patch patch",
        ("v.patch_embd.weight", "visual.patch_embedding.weight", f"{_VISION}.embeddings.patch_embedding.weight"),
    ),
    Row(
        "positions dim",
        ("v.position_embd.weight", "visual.pos_embedding", f"{_VISION}.embeddings.position_embedding.weight"),
    ),
    *_layer("dim", "v.pre_ln", "visual.pre_norm", f"{_VISION}.pre_layrnorm"),
    *_layer("dim", "v.blk.{n}.ln1", "visual.transformer.{n}.norm1", f"{_LAYER}.layer_norm1"),
    *_layer(
        "3*dim dim",
        "v.blk.{n}.attn_qkv",
        "visual.transformer.{n}.attn.to_qkv",
        f"{_LAYER}.self_attn.qkv_proj",
    ),
    *_layer("dim dim", "v.blk.{n}.attn_out", "visual.transformer.{n}.attn.proj", f"{_LAYER}.self_attn.out_proj"),
    *_layer("dim", "v.blk.{n}.ln2", "visual.transformer.{n}.norm2", f"{_LAYER}.layer_norm2"),
    *_layer("ffn dim", "v.blk.{n}.ffn_up", "visual.transformer.{n}.mlp.0", f"{_LAYER}.mlp.fc1"),
    *_layer("dim ffn", "v.blk.{n}.ffn_down", "visual.transformer.{n}.mlp.2", f"{_LAYER}.mlp.fc2"),
    *_layer("dim", "v.post_ln", "visual.post_norm", f"{_VISION}.post_layernorm"),
    Row("dim projection", ("v.head", "visual.head", "visual_projection.weight"), optional=True),
)
CLIP_VISION = Table(  # transformers 5 leaves out the first word of names
    "image_encoder",
    ("gguf", "original", "transformers", "transformers 5"),
    tuple(replace(row, names=(*row.names, row.names[-1].removeprefix(f"{_VISION}."))) for row in _CLIP_ROWS),
    ignored=r"textual\..*|text_model\..*|text_projection\.weight|log(it)?_scale|.*\.position_ids",
)


def _wav2vec2() -> list[Row]:
    rows = []
    for layer in range(7):
        name = f"feature_extractor.conv_layers.{layer}"
        rows.append(Row(f"conv {'conv' if layer else 1} kernel{layer}", (f"{name}.conv.weight",)))
        if layer == 0:
            rows += _layer("conv", f"{name}.layer_norm")
    conv, block = "encoder.pos_conv_embed.conv", "encoder.layers.{n}"
    return [
        *rows,
        *_layer("conv", "feature_projection.layer_norm"),
        *_layer("dim conv", "feature_projection.projection"),
        Row("1 1 position_kernel", (f"{conv}.weight_g", f"{conv}.parametrizations.weight.original0")),
        Row("dim group position_kernel", (f"{conv}.weight_v", f"{conv}.parametrizations.weight.original1")),
        Row("dim", (f"{conv}.bias",)),
        *_layer("dim", "encoder.layer_norm"),
        *(row for part in ("q", "k", "v", "out") for row in _layer("dim dim", f"{block}.attention.{part}_proj")),
        *_layer("dim", f"{block}.layer_norm"),
        *_layer("ffn dim", f"{block}.feed_forward.intermediate_dense"),
        *_layer("dim ffn", f"{block}.feed_forward.output_dense"),
        *_layer("dim", f"{block}.final_layer_norm"),
    ]


# wav2vec2 base. The second naming comes from newer versions of torch, which spell weight normalisation differently.
WAV2VEC2 = Table(
    "audio_encoder",
    ("transformers", "parametrized"),
    tuple(_wav2vec2()),
    ignored=r"(project_hid|project_q|quantizer|lm_head|projector|classifier)\..*|masked_spec_embed",
)

TABLES = (*TRANSFORMERS, UMT5_ENCODER, WAN_VAE, CLIP_VISION, WAV2VEC2)


def role_of(names: Collection[str]) -> str:
    """The role of a file in a pipeline, judged by its tensors' names alone; "" if no family has such tensors."""
    return next((match.table.role for match in recognise(names, TABLES)), "")
