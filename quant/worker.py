"""Encode pieces of tensors into a file, in this process or in worker processes.

Encoders consist of many small operations: threads would wait for the GIL in each of them, processes do not. A worker is
this module run by the same interpreter. It reads pieces as lines of JSON, writes their bytes to the file, and answers
each with a line.
"""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor

from skyrun.kernels import block_format
from skyrun.kernels.errors import FAILED, SkyrunError
from skyrun.quant.encoders.encode import quantize
from skyrun.quant.sources.source import SourceTensor
from skyrun.quant.threads import one_thread

_PIECE_WEIGHTS = 1 << 22  # that are encoded at a time; limits the memory of a worker
_MAX_WORKERS = 4  # each is an interpreter with torch, about 250 MiB
_WORTH_A_WORKER = 1 << 26  # weights; fewer are encoded before a worker has started


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a tensor, and the output file and offset that their bytes are written to."""

    source: SourceTensor
    start: int
    stop: int
    type: str
    importance: Tensor | None
    path: Path
    offset: int
    device: str

    def as_json(self) -> dict[str, Any]:
        packed = None if self.importance is None else base64.b64encode(self.importance.numpy().tobytes()).decode()
        plain = {name: getattr(self, name) for name in ("start", "stop", "type", "offset", "device")}
        return plain | {"source": self.source.as_json(), "importance": packed, "path": str(self.path)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Piece":
        packed = fields["importance"]
        importance = None
        if packed is not None:
            importance = torch.frombuffer(bytearray(base64.b64decode(packed)), dtype=torch.float32)
        decoded = {"source": SourceTensor.from_json(fields["source"]), "path": Path(fields["path"])}
        return cls(**fields | decoded | {"importance": importance})


def pieces(
    source: SourceTensor, type: str, importance: Tensor | None, path: Path, offset: int, device: str
) -> list[Piece]:
    """Split a tensor into pieces of whole rows. path, offset: where it is written. The rest is as in Piece."""
    row_bytes = block_format(type).row_bytes(source.cols)
    step = max(1, _PIECE_WEIGHTS // source.cols)
    return [
        Piece(source, start, min(start + step, source.rows), type, importance, path, offset + start * row_bytes, device)
        for start in range(0, source.rows, step)
    ]


def encode_piece(piece: Piece) -> None:
    """Read, encode and write one piece. A SkyrunError names the tensor."""
    source = piece.source
    try:
        weights = source.read(piece.start, piece.stop).to(piece.device)
        importance = None if piece.importance is None else piece.importance.to(piece.device)
        if source.is_stored_as(piece.type):  # copied: encoding it again could only lose accuracy
            _check_finite(weights)
            encoded = source.stored_rows(piece.start, piece.stop)
        else:
            encoded = quantize(weights, piece.type, importance).cpu().numpy().data.cast("B")
    except SkyrunError as error:
        where = f"{source.name} in {source.file}"
        message = f"cannot encode {where} as {piece.type}: {error.message}"
        raise SkyrunError(message, error.hint, error.code) from error
    try:
        with open(piece.path, "rb+", buffering=0) as out:
            out.seek(piece.offset)
            while encoded:
                encoded = encoded[out.write(encoded) :]
    except OSError as error:
        hint = "what is finished is kept: free some space, then run the same command again to go on from there"
        raise SkyrunError(f"cannot write {piece.path}: {error}", hint, FAILED) from error


def _check_finite(weights: Tensor) -> None:
    if not torch.isfinite(weights).all():
        count = int((~torch.isfinite(weights)).sum())
        raise SkyrunError(f"{count} weights are NaN or infinite", "download or make the source again")


class _Process:
    """A worker process and the pipes to it."""

    def __init__(self) -> None:
        # It imports the same modules as this process, whatever the current folder contains.
        package = Path(sys.modules["skyrun"].__path__[0]).parent
        paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), *filter(None, sys.path)])}
        command = [sys.executable, "-P", "-m", "skyrun.quant.worker"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=paths,
            start_new_session=True,  # so that Ctrl-C interrupts this process only, which then decides
        )

    def encode(self, piece: Piece) -> None:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(piece.as_json()) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            hint = "its output is above; run the same command again to go on from the last finished tensor"
            raise SkyrunError(f"an encoding process ended with code {self._process.wait()}", hint, FAILED)
        failure = json.loads(answer)
        if failure:
            raise SkyrunError(**failure)

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


class Workers:
    """Encodes pieces, with worker processes if there is enough work to make up for starting them."""

    def __init__(self, weights: int, device: str, count: int | None = None) -> None:
        if count is None:
            cores = psutil.cpu_count(logical=False) or 1
            count = min(cores, _MAX_WORKERS) if device == "cpu" and weights > _WORTH_A_WORKER else 0
        self._processes = [_Process() for _ in range(count)]
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(max(1, count))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.stop()
        self._threads.shutdown()

    def encode(self, pieces: list[Piece]) -> Iterator[Piece]:
        """Encode pieces and yield each when it has been written, in any order."""
        if not self._processes:
            for piece in pieces:
                with one_thread():
                    encode_piece(piece)
                yield piece
            return
        futures = {self._threads.submit(self._encode, piece): piece for piece in pieces}
        for done in as_completed(futures):
            done.result()
            yield futures[done]

    def _encode(self, piece: Piece) -> None:
        process = self._idle.get()
        try:
            process.encode(piece)
        finally:
            self._idle.put(process)


def _serve() -> None:
    """Encode pieces from stdin until it closes."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        failure = None
        try:
            encode_piece(Piece.from_json(json.loads(line)))
        except SkyrunError as error:
            failure = {"message": error.message, "hint": error.hint, "code": error.code}
        try:
            print(json.dumps(failure), flush=True)
        except OSError:  # the parent process was killed; flushing again at exit would fail too
            os._exit(1)


if __name__ == "__main__":
    with torch.inference_mode():
        _serve()
