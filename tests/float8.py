"""Triton's interpreter rounds to float8 without carrying into the exponent: while it is here, torch rounds for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def rounded_as_on_a_card() -> Iterator[None]:
    """While inside, the interpreter rounds float32 to the nearest float8 (e4m3), half to even."""
    convert = interpreter._convert_float

    def nearest(values, from_type, to_type, rounding):  # type: ignore[no-untyped-def]
        if (from_type, to_type) != (tl.float32, tl.float8e4nv):
            return convert(values, from_type, to_type, rounding)
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    with patch.object(interpreter, "_convert_float", nearest):
        yield
