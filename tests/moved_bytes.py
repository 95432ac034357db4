"""Count the bytes that the passes between products read and write in a transformer block, without a GPU."""

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from block_memory import one_block, pretended_card

from skyrun.tasks import TASKS

del sys.path[0]

# Products and attention have rates of their own; decoding weights is counted by their bytes; the rest moves nothing.
_COUNTED_ELSEWHERE = {"linear", "decode_kernel", "encode_kernel", "multiply_kernel", "attend_kernel"}
_MOVES_NOTHING = {"empty", "empty_like"}


class _Passes(TorchDispatchMode):
    """Bytes by operation. Operations whose result is a view of their input move none."""

    def __init__(self, found):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.__name__.partition(".")[0]
        given, made = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in ((args, kwargs), result)
        )
        view = {leaf.untyped_storage()._cdata for leaf in made} <= {leaf.untyped_storage()._cdata for leaf in given}
        if name == "copy_":
            self._found[name] += sum(leaf.nbytes for leaf in given)
        elif not view and name not in _MOVES_NOTHING:
            self._found[name] += sum(leaf.nbytes for leaf in (*given, *made))
        return result


def bytes_moved(way, attention, tokens=1 << 16):
    """Bytes for each token and channel of a block of reference to video, by operation; ways as `presets.memory` has."""
    found = Counter()

    def run(kernel, *args, **_):
        tensors = dict(zip(kernel.arg_names, args, strict=False))
        for name, other in (("scales", "out"), ("cos", "x"), ("sin", "x")):  # where there is none, another is given
            if tensors.get(name) is tensors.get(other):
                tensors.pop(name, None)
        found[kernel.fn.__name__] += sum(t.nbytes for t in tensors.values() if isinstance(t, torch.Tensor))

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(pretended_card(way))
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(patch.object(kind, "run", run))
        block = one_block("r2v", way, attention, tokens)
        stack.enter_context(_Passes(found))
        block()
    values = tokens * TASKS["r2v"].dims["dim"]
    return {name: nbytes / values for name, nbytes in found.items() if name not in _COUNTED_ELSEWHERE}
