"""The table of formats: the numbers are gguf-py's, and reading it costs nothing."""

import subprocess
import sys

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from skyrun.errors import SkyrunError
from skyrun.kernels import FORMATS, block_format


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_of_gguf_py(name):
    kind = GGMLQuantizationType[name]
    format = block_format(name)
    assert (format.name, format.id) == (name, kind)
    assert (format.block_size, format.block_bytes) == GGML_QUANT_SIZES[kind]


def test_an_unknown_type_lists_the_known():
    with pytest.raises(SkyrunError) as error:
        block_format("Q9_0")
    assert all(name in error.value.hint for name in FORMATS)


@pytest.mark.parametrize(
    "statement",
    [
        "from skyrun import SkyrunError",
        "from skyrun.kernels.errors import SkyrunError",
        "import skyrun.kernels.formats",
    ],
)
def test_imports_are_light(statement):
    heavy = {"gguf", "numpy", "torch", "psutil"}
    code = f"import sys; {statement}; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
