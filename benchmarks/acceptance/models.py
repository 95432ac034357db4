"""Models with random weights, of the published shapes or small ones, and requests that run them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from acceptance.step import Scale
from skyrun.planning.request import Request
from skyrun.tools.bench.synthetic_model import MODELS, write_model
from skyrun.tools.calibration_prompts import draw_images

_SMALL = {
    "transformer": {"dim": 256, "ffn": 512, "in": 16, "out": 16, "freq": 256, "text": 128},
    "text_encoder": {"dim": 128, "inner": 128, "ffn": 256, "vocab": 256, "buckets": 32, "heads": 2},
    "vae": {"base": 8, "z": 16},
}


def model_name(scale: Scale) -> str:
    """The name of a model that can be written."""
    MODELS["r2v-small"] = _SMALL
    return scale.of("r2v-14b", "r2v-small")


@contextmanager
def random_clip(scale: Scale, blocks: int, **settings: Any) -> Iterator[Request]:
    """A request for a clip of one reference, made by a model that is there meanwhile.

    Args:
        scale: chooses the size of the model, and of the clip unless the settings do.
        blocks: of the transformer.
        settings: other arguments of the request.
    """
    with TemporaryDirectory() as place:
        folder = Path(place)
        for _ in write_model(folder, model_name(scale), "Q8_0", blocks):
            pass
        images = draw_images(folder)[:1]
        size = {} if scale.small else {"resolution": "720P"}
        clip = {"size": (32, 48), "frames": 5} if scale.small else {"frames": 121}
        values = {"model": folder, "seed": 0, "steps": 2, "device": str(scale.device)} | size | clip | settings
        yield Request("r2v", "a person at the sea", images, **values)
