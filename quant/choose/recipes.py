"""Choose the type of each tensor: by a recipe, which is the mix that a file's type stands for, and by rules."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from skyrun.kernels import FORMATS, block_format
from skyrun.kernels.errors import SkyrunError
from skyrun.kernels.files.recipes import Recipe, find_recipe, recipe_types
from skyrun.quant.sources.families import ModelTensor

KEPT = ("F32", "F16", "BF16")  # plain types, which a tensor can keep


# What llama.cpp takes for rows that are not whole blocks of 256: a type with blocks of 32 that loses no more.
_FALLBACKS = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "IQ4_XS": "IQ4_NL", "Q3_K": "IQ4_NL", "Q2_K": "IQ4_NL"}

_BLOCK = re.compile(r"(blocks|enc\.blk|v\.blk)\.\d+\.")


@dataclass(frozen=True)
class TypeRule:
    """A rule that gives `type` to matrices whose name in the file contains a match of `pattern`."""

    pattern: re.Pattern[str]
    type: str

    def matches(self, tensor: ModelTensor) -> bool:
        return len(tensor.shape) == 2 and bool(self.pattern.search(tensor.name))


@dataclass(frozen=True)
class Choice:
    """The type of a tensor. fallback: why it is not the requested type; empty if it is."""

    type: str
    fallback: str = ""


def parse_rule(text: str) -> TypeRule:
    """Parse "regex=TYPE" from the command line. Raises SkyrunError if the pattern or the type is not valid."""
    pattern, equals, type = text.rpartition("=")
    if not equals or not pattern:
        raise SkyrunError(f"the rule {text!r} is not regex=TYPE", r"for example --type-rule 'ffn\.2=Q6_K'")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SkyrunError(f"{pattern!r} is not a regular expression: {error}", "correct the rule") from error
    return TypeRule(compiled, block_format(type.upper()).name)


def default_encoder_quant(quant: str) -> str:
    """The default recipe of text and image encoders: that of the transformer, but not below Q8_0.

    They run once per clip but their error affects every step, so saving bits here gains nothing.
    """
    bits = block_format(find_recipe(quant).base).bits_per_weight
    return quant if bits >= FORMATS["Q8_0"].bits_per_weight else "Q8_0"


def is_quantizable(tensor: ModelTensor, role: str) -> bool:
    """Whether a tensor is a matrix whose type comes from a recipe.

    In a transformer and an image encoder these are the matrices in blocks, in a text encoder all but the position bias.
    Norms, biases, modulation and convolutions are F32, because readers of GGUF use them without decoding.
    """
    if len(tensor.shape) != 2 or role not in ("transformer", "text_encoder", "image_encoder"):
        return False
    if role == "text_encoder":
        return not tensor.name.endswith("attn_rel_b.weight")
    return tensor.name.endswith(".weight") and bool(_BLOCK.match(tensor.name))


def keep_type(tensor: ModelTensor) -> str:
    """The plain type that a tensor keeps: that of its source, or F32 if the source is quantized or has 8 bits."""
    return tensor.source.dtype if tensor.source.dtype in KEPT else "F32"


def _kept(tensor: ModelTensor, recipe: Recipe | None) -> str:
    """The type of a tensor that is not quantized."""
    if recipe is None:
        return keep_type(tensor)
    matrix = len(tensor.shape) == 2 and not tensor.name.endswith("attn_rel_b.weight")
    if not matrix or recipe.base == "F32":
        return "F32"
    kept = keep_type(tensor)
    return "BF16" if kept == "F32" and tensor.source.dtype != "F32" else kept


def _fallback(type: str, cols: int) -> str:
    """The type for rows of `cols` that are not whole blocks of `type`."""
    smaller = _FALLBACKS.get(type, "F16")
    return "F16" if cols % block_format(smaller).block_size else smaller


def label_of(quant: str, tensors: Iterable[ModelTensor], choices: Mapping[str, "Choice"]) -> str:
    """The recipe that a file is named after: the requested one, or the type that most weights fell back to."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[choices[tensor.name].type] += tensor.source.numel
    recipe = find_recipe(quant)
    main = weights.most_common(1)[0][0] if weights else recipe.base
    return quant if main in (recipe.base, recipe.value, recipe.down, recipe.early_value) else main


def choose_types(
    tensors: tuple[ModelTensor, ...], role: str, quant: str, rules: tuple[TypeRule, ...] = ()
) -> dict[str, Choice]:
    """The choice for each tensor, by name. The first rule that matches a matrix takes precedence over the recipe.

    Args:
        tensors: in file order.
        role: of the model.
        quant: name of the recipe; empty keeps the types of the source.
        rules: from the command line.

    Raises one SkyrunError that lists the matrices whose rows a rule's type cannot hold.
    """
    recipe = find_recipe(quant) if quant else None
    matrices = [tensor for tensor in tensors if is_quantizable(tensor, role)]
    wanted = recipe_types((tensor.name for tensor in matrices), recipe) if recipe else {}
    choices, problems = {}, []
    for tensor in tensors:
        rule = next((rule for rule in rules if rule.matches(tensor)), None)
        type = rule.type if rule else wanted.get(tensor.name) or _kept(tensor, recipe)
        choice = Choice(type)
        if tensor.shape and tensor.shape[-1] % block_format(type).block_size:
            why = f"rows of {tensor.shape[-1]} are not a multiple of {type}'s {block_format(type).block_size}"
            choice = Choice(_fallback(type, tensor.shape[-1]), why)
            if rule:
                problems.append(f"{tensor.name}: {why}")
        choices[tensor.name] = choice
    if problems:
        raise SkyrunError.listing("these matrices cannot have the type of a rule", problems, "narrow the rule")
    return choices
