"""Types per tensor: the community's mixes, rules on top, and rows that do not fit."""

from collections import Counter
from pathlib import Path

import gguf
import pytest

from skyrun.errors import SkyrunError
from skyrun.kernels import FORMATS
from skyrun.kernels.files.recipes import RECIPES, find_recipe
from skyrun.quant.choose.recipes import choose_types, default_encoder_quant, parse_rule
from skyrun.quant.sources.families import ModelTensor
from skyrun.quant.sources.source import SourceTensor

DIM, FFN, LAYERS = 5120, 13824, 40


def tensor(name, *shape, dtype="BF16"):
    return ModelTensor(name, shape, SourceTensor(name, shape, dtype, Path("model.safetensors"), 0))


def transformer():
    """Matrices of a 14B transformer, and one of each tensor that is none."""
    yield tensor("patch_embedding.weight", DIM, 16, 1, 2, 2)
    yield tensor("text_embedding.0.weight", DIM, 4096)
    yield tensor("time_projection.1.weight", 6 * DIM, DIM, dtype="F32")
    for n in range(LAYERS):
        yield tensor(f"blocks.{n}.modulation", 1, 6, DIM)
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                yield tensor(f"blocks.{n}.{attention}.{name}.weight", DIM, DIM)
                yield tensor(f"blocks.{n}.{attention}.{name}.bias", DIM)
            yield tensor(f"blocks.{n}.{attention}.norm_q.weight", DIM)
        yield tensor(f"blocks.{n}.ffn.0.weight", FFN, DIM)
        yield tensor(f"blocks.{n}.ffn.2.weight", DIM, FFN)
    yield tensor("head.head.weight", 64, DIM, dtype="F8_E4M3")


TENSORS = tuple(transformer())


# Recipe: types of value projections (the first of the file, then the others), of ffn.2, of the rest, and bits per
# weight of the blocks' matrices as the community's files have them.
MIXES = [
    ("Q2_K", ["Q3_K"] * 80, "Q2_K", "Q2_K", 2.75),
    ("Q3_K_S", ["Q3_K"] * 80, "Q3_K", "Q3_K", 3.44),
    ("Q3_K_M", ["Q5_K"] * 2 + ["Q4_K"] * 78, "Q4_K", "Q3_K", 3.81),
    ("Q3_K_L", ["Q5_K"] * 80, "Q5_K", "Q3_K", 4.16),
    ("Q4_K_S", ["Q5_K"] * 4 + ["Q4_K"] * 76, "Q5_K", "Q4_K", 4.70),
    ("Q4_K_M", ["Q6_K"] * 80, "Q6_K", "Q4_K", 5.22),
    ("Q5_K_S", ["Q5_K"] * 80, "Q5_K", "Q5_K", 5.50),
    ("Q5_K_M", ["Q6_K"] * 80, "Q6_K", "Q5_K", 5.87),
    ("Q6_K", ["Q6_K"] * 80, "Q6_K", "Q6_K", 6.56),
    ("Q4_0", ["Q4_0"] * 80, "Q4_1", "Q4_0", 4.60),
    ("Q5_0", ["Q5_0"] * 80, "Q5_1", "Q5_0", 5.60),
    ("Q8_0", ["Q8_0"] * 80, "Q8_0", "Q8_0", 8.5),
    ("Q4_K", ["Q4_K"] * 80, "Q4_K", "Q4_K", 4.5),
    ("F16", ["F16"] * 80, "F16", "F16", 16),
]


@pytest.mark.parametrize(("quant", "values", "down", "rest", "bits"), MIXES)
def test_the_mix_is_that_of_the_community(quant, values, down, rest, bits):
    choices = {name: choice.type for name, choice in choose_types(TENSORS, "transformer", quant).items()}
    assert [type for name, type in choices.items() if name.endswith(".v.weight")] == values
    assert {type for name, type in choices.items() if name.endswith(".ffn.2.weight")} == {down}
    others = ("q.weight", "k.weight", "o.weight", "ffn.0.weight")
    assert {
        choices[t.name]
        for t in TENSORS
        if t.name.startswith("blocks") and t.name.endswith(others) and len(t.shape) == 2
    } == {rest}
    matrices = [t for t in TENSORS if t.name.startswith("blocks.") and len(t.shape) == 2]
    total = sum(t.source.numel * FORMATS[choices[t.name]].bits_per_weight for t in matrices)
    assert total / sum(t.source.numel for t in matrices) == pytest.approx(bits, abs=0.01)


@pytest.mark.parametrize(("quant", "values"), [("Q4_K_M", "Q6_K"), ("Q4_K_S", "Q4_K"), ("Q8_0", "Q8_0")])
def test_values_of_pictures_and_speech_are_values(quant, values):
    """The early ones of a file are counted without them, so that a talking avatar has the same mix."""
    extra = [tensor("blocks.0.cross_attn.v_img.weight", DIM, DIM), tensor("blocks.0.cross_attn.k_img.weight", DIM, DIM)]
    extra += [tensor("blocks.0.audio_cross_attn.kv_linear.weight", 2 * DIM, 768)]
    extra += [tensor("audio_proj.proj2.weight", 512, 512)]
    alone = choose_types(TENSORS, "transformer", quant)
    choices = choose_types((*extra, *TENSORS), "transformer", quant)
    types = [choices[t.name].type for t in extra]
    assert types == [values, find_recipe(quant).base, values, "BF16"]
    assert {t.name: choices[t.name] for t in TENSORS} == alone


@pytest.mark.parametrize("quant", list(RECIPES))
def test_what_is_no_matrix_of_a_block_is_never_quantized(quant):
    choices = {name: choice.type for name, choice in choose_types(TENSORS, "transformer", quant).items()}
    for t in TENSORS:
        if len(t.shape) != 2:
            assert choices[t.name] == "F32", t.name
    whole = quant == "F32"
    assert choices["text_embedding.0.weight"] == ("F32" if whole else "BF16")
    assert choices["time_projection.1.weight"] == "F32"
    assert choices["head.head.weight"] == ("F32" if whole else "BF16")  # 8 bits are no type of GGUF


def test_the_first_rule_that_matches_wins():
    rules = (parse_rule(r"blocks\.0\..*\.v\.=Q8_0"), parse_rule(r"\.v\.=Q4_K"), parse_rule("head=f16"))
    choices = {name: choice.type for name, choice in choose_types(TENSORS, "transformer", "Q2_K", rules).items()}
    values = Counter(type for name, type in choices.items() if name.endswith(".v.weight"))
    assert values == {"Q8_0": 2, "Q4_K": 78}
    assert choices["blocks.0.self_attn.v.bias"] == "F32"  # rules are about matrices
    assert choices["head.head.weight"] == "F16"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("Q4_K", "is not regex=TYPE"),
        ("=Q4_K", "is not regex=TYPE"),
        ("(=Q4_K", "is not a regular expression"),
        ("ffn=Q4_K_M", "unknown type 'Q4_K_M'"),
    ],
)
def test_what_is_no_rule_is_refused(rule, message):
    with pytest.raises(SkyrunError, match=message):
        parse_rule(rule)


def test_a_rule_that_cannot_be_kept_is_an_error_and_a_recipe_falls_back():
    odd = (tensor("blocks.0.ffn.0.weight", 64, 96), tensor("blocks.0.ffn.2.weight", 64, 256))
    choices = choose_types(odd, "transformer", "Q4_K_M")
    assert choices["blocks.0.ffn.0.weight"].type == "Q5_0"  # as llama.cpp does
    assert choices["blocks.0.ffn.0.weight"].fallback == "rows of 96 are not a multiple of Q4_K's 256"
    assert choices["blocks.0.ffn.2.weight"].type == "Q6_K"
    with pytest.raises(SkyrunError, match="ffn.0.weight: rows of 96"):
        choose_types(odd, "transformer", "Q8_0", (parse_rule("ffn=Q4_K"),))


def test_encoders_and_autoencoder():
    encoder = (
        tensor("token_embd.weight", 512, 256),
        tensor("enc.blk.0.attn_v.weight", 256, 256),
        tensor("enc.blk.0.attn_rel_b.weight", 32, 8),
        tensor("enc.blk.0.attn_norm.weight", 256),
    )
    types = [choice.type for choice in choose_types(encoder, "text_encoder", "Q4_K_M").values()]
    assert types == ["Q4_K", "Q6_K", "F32", "F32"]
    kept = (
        tensor("conv1.weight", 8, 8, 3, 3, 3),
        tensor("conv1.bias", 8, dtype="F16"),
        tensor("scaled", 8, 8, dtype="F8_E4M3"),
    )
    assert [choice.type for choice in choose_types(kept, "vae", "").values()] == ["BF16", "F16", "F32"]


@pytest.mark.parametrize(
    ("quant", "expected"), [("Q2_K", "Q8_0"), ("Q4_K_M", "Q8_0"), ("Q8_0", "Q8_0"), ("BF16", "BF16")]
)
def test_the_text_encoder_is_not_below_eight_bits_by_itself(quant, expected):
    assert default_encoder_quant(quant) == expected


def test_recipes_are_found_in_any_case():
    assert find_recipe("q4_k_m") is RECIPES["Q4_K_M"]
    with pytest.raises(SkyrunError, match="cannot write a file of type 'Q4_K_XL'"):
        find_recipe("Q4_K_XL")


def test_file_types_are_llama_cpps():
    names = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_S", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S"}
    for name, recipe in RECIPES.items():
        assert recipe.file_type == gguf.LlamaFileType[names.get(name, f"MOSTLY_{name}")]
