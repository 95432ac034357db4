"""What quantization costs a trained model: PYTHONPATH=. python benchmarks/trained.py -o results.jsonl

Makes clips of the small model that skyrun carries with every type, with and without importance, with int8, and with
--target-size, and compares each with the clip of F32 weights. A line of JSON per variant is added to the file, and the
same command goes on with it; at the end it prints tables. With --ladder and --sensitivity it draws pictures.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from environment import environment
from trained_tables import draw_ladder, draw_sensitivity, print_tables

from skyrun.kernels.quantized_keys import PRECISIONS
from skyrun.models.folder import open_folder
from skyrun.quant import convert
from skyrun.quant.choose.importance import Importance, write_importance
from skyrun.tools.calibrate import SumsOfSquares
from training.requests import Made, drawn_request, latent_error, make, psnr

CHECKPOINT = Path(__file__).parent.parent / "skyrun" / "demo" / "checkpoint"
TYPES = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_K", "Q4_1", "Q4_0"),
    *("IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
)
SHOWN = ("F32", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
CALIBRATED = 16  # clips that importance is collected from
LADDER_CLIPS = 3
ALONE = "Q3_K"  # the type of the one matrix that is quantized to see how much it matters
ALONE_CLIPS = 16


@dataclass(frozen=True)
class Variant:
    """How a model is made and run. settings: arguments of `convert`, with a target size as the recipe it is that of."""

    group: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    precision: str = "exact"
    attention: str = "exact"


class Bench:
    """The clips, what F32 weights make of them, and the converted models in a folder."""

    def __init__(self, checkpoint: Path, folder: Path, clips: int, use: str) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self.original = self._model("F32", quant="F32")
        tensors = open_folder(self.original).transformers[0].tensors.values()
        self.matrices = [t.name for t in tensors if len(t.shape) == 2 and t.name.startswith("blocks.")]
        requests = [drawn_request(number, use, folder)[1] for number in range(clips)]
        self.wanted = [(request, make(replace(request, model=self.original))) for request in requests]
        self._imatrix = folder / "importance.gguf"
        write_importance(self._imatrix, self._importance())

    def _model(self, name: str, **settings: Any) -> Path:
        """The folder of a converted model. imatrix: True for the importance. target_size: that of a recipe's file."""
        folder = self._folder / name
        if settings.pop("imatrix", False):
            settings["imatrix"] = self._imatrix
        if "target_size" in settings:
            settings["target_size"] = self.nbytes(self._model(settings["target_size"], quant=settings["target_size"]))
        if not folder.exists():
            convert(self._checkpoint, folder, **settings)
        return folder

    @staticmethod
    def nbytes(model: Path) -> int:
        """Bytes of a model's transformer."""
        return open_folder(model).transformers[0].path.stat().st_size

    def _importance(self) -> Importance:
        """Importance from clips that are not among those that judge it."""
        squares = SumsOfSquares()
        for number in range(CALIBRATED):
            request = drawn_request(number, "importance", self._folder)[1]
            make(replace(request, model=self.original), False, squares)
        return Importance(squares.sums(), squares.counts, chunks=CALIBRATED)

    def shown(self, quants: Sequence[str]) -> dict[str, list[Made]]:
        """The clips that the ladder shows, by type."""
        requests = [request for request, _ in self.wanted[:LADDER_CLIPS]]
        models = {quant: self._model(quant, quant=quant) for quant in quants}
        return {quant: [make(replace(r, model=model)) for r in requests] for quant, model in models.items()}

    def measure(self, variant: Variant) -> dict[str, Any]:
        """A line of the results: bytes, and for every clip the error of its latents and its PSNR in dB."""
        name = variant.name if variant.group == "plain" else f"{variant.name} {variant.group}"
        model, alone = self._model(name, **variant.settings), variant.group == "alone"
        errors, ratios = [], []
        for request, wanted in self.wanted[: ALONE_CLIPS if alone else None]:
            request = replace(request, model=model, precision=variant.precision, attention=variant.attention)
            made = make(request, not alone)
            errors.append(latent_error(made.latents, wanted.latents))
            if not alone:
                ratios.append(psnr(made.frames, wanted.frames))
        return {
            "group": variant.group,
            "name": variant.name,
            "bytes": self.nbytes(model),
            "errors": [round(error, 6) for error in errors],
            "psnr": [round(ratio, 3) for ratio in ratios],
        }


def variants(matrices: Sequence[str]) -> Iterator[Variant]:
    """Everything that is measured. Groups: what all names of a group differ by from those of "plain"."""
    for name in TYPES:
        yield Variant("plain", name, {"quant": name})
        yield Variant("size", name, {"target_size": name})
        if name != "Q8_0":  # importance does not change it
            yield Variant("importance", name, {"quant": name, "imatrix": True})
            yield Variant("size, importance", name, {"target_size": name, "imatrix": True})
    for name in ("F32", "Q8_0", "Q4_K_M"):
        yield Variant("int8", name, {"quant": name}, precision="fast")
    for name in PRECISIONS[1:]:  # by the kernels' twins: no card is needed
        yield Variant("attention", name, {"quant": "F32"}, attention=name)
    for name in matrices:
        rule = f"^{re.escape(name)}$={ALONE}"
        yield Variant("alone", name, {"quant": "F32", "text_encoder_quant": "F32", "type_rules": [rule]})


def main() -> None:
    """Measure what the file does not have yet, and show everything that it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="results, a line of JSON per variant")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--use", default="judge", help="another word draws other clips, to tune on: %(default)s")
    parser.add_argument("--groups", nargs="+", help="only these groups of variants")
    parser.add_argument("--ladder", type=Path, metavar="PNG", help="draw clips of some types")
    parser.add_argument("--sensitivity", type=Path, metavar="PNG", help="draw how much each matrix matters")
    arguments = parser.parse_args()
    lines = (
        [json.loads(line) for line in arguments.output.read_text().splitlines()] if arguments.output.exists() else []
    )
    done = {(line["group"], line["name"]) for line in lines}
    with TemporaryDirectory() as name:
        bench = Bench(arguments.checkpoint, Path(name), arguments.clips, arguments.use)
        for variant in variants(bench.matrices):
            if (variant.group, variant.name) in done or variant.group not in (arguments.groups or [variant.group]):
                continue
            lines.append(bench.measure(variant))
            with open(arguments.output, "a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
        if arguments.ladder:
            draw_ladder(bench.shown(SHOWN)).save(arguments.ladder)
    if arguments.sensitivity:
        draw_sensitivity(lines).save(arguments.sensitivity)
    print(environment())
    print_tables(lines)


if __name__ == "__main__":
    main()
