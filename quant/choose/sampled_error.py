"""Measure the error of a type on some rows of a tensor, before anything is written."""

from collections.abc import Iterable

import torch
from torch import Tensor

from skyrun.kernels import dequantize
from skyrun.kernels.errors import SkyrunError
from skyrun.quant.encoders.encode import quantize
from skyrun.quant.sources.families import ModelTensor
from skyrun.quant.sources.source import SourceTensor

_SAMPLE_WEIGHTS = 1 << 16
_RUNS = 8


def noise_power(x: Tensor, decoded: Tensor, importance: Tensor | None) -> tuple[float, float]:
    """Power of the error and of the signal in a layer's output, assuming that input channels are not correlated.

    The error of output i is sum_j (x - decoded)_ij * input_j; its mean square is then the sum over j of
    (x - decoded)_ij^2 * importance_j.

    Args:
        x: the weights, float32 [rows, cols].
        decoded: the weights after quantization.
        importance: the mean square of each input channel, [cols]; None stands for ones.
    """
    noise, signal = (part.square().sum(0, dtype=torch.float64) for part in (x - decoded, x))
    if importance is not None:
        noise, signal = noise * importance, signal * importance
    return float(noise.sum()), float(signal.sum())


def sample_rows(source: SourceTensor) -> Tensor:
    """Eight evenly spaced runs of rows of a matrix, float32 [n, cols]: about 65 k weights, at least eight rows."""
    length = max(1, _SAMPLE_WEIGHTS // (_RUNS * source.cols))
    if source.rows <= _RUNS * length:
        return source.read()
    starts = [(source.rows - length) * run // (_RUNS - 1) for run in range(_RUNS)]
    return torch.cat([source.read(start, start + length) for start in starts])


def sampled_errors(tensor: ModelTensor, types: Iterable[str], importance: Tensor | None) -> dict[str, float]:
    """Noise over signal in the output for each type. Raises SkyrunError, which names the tensor, if encoding fails."""
    x = sample_rows(tensor.source)
    errors = {}
    for type in types:
        if tensor.source.is_stored_as(type):
            errors[type] = 0.0
            continue
        try:
            decoded = dequantize(quantize(x, type, importance), type)
        except SkyrunError as error:
            where = f"{tensor.source.name} in {tensor.source.file}"
            raise SkyrunError(f"cannot encode {where} as {type}: {error.message}", error.hint) from error
        noise, signal = noise_power(x, decoded, importance)
        errors[type] = noise / signal if signal else 0.0
    return errors
