"""Damage every kind of file and reply that comes from outside: may anything but SkyrunError come out?

Each execution damages one valid sample by its own seed and reads it in a process that may take ten seconds and
little memory. What comes out otherwise (other exceptions, signals, endless sentences) is printed with its seed, and the
damaged file is kept: `python benchmarks/fuzz.py --only KIND --seed SEED --runs 1` does it again. Needs fork.
"""

import argparse
import faulthandler
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory, gettempdir

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of torch do not survive a fork

import psutil
from environment import environment
from fuzz_kinds import Kind, kinds_in

from skyrun.errors import SkyrunError

_SECONDS, _WALL = 10, 60  # of the processor, and of the clock, for one execution
_MEMORY = 1 << 30  # bytes that a process may take beyond what it has at first
_BATCH = 500  # executions in one process
_LONGEST = 10_000  # characters of a message


def attempt(kind: Kind, seed: int) -> str:
    """Damage a sample and read it. Returns what came out that may not; "" if all is well."""
    random = Random(seed)
    sample = random.choice(kind.samples)
    sample.path.write_bytes(sample.damage(sample.data, random))
    try:
        kind.use(sample.path)
    except SkyrunError as error:
        if not error.message or len(error.message) + len(error.hint) > _LONGEST:
            return f"a message of {len(error.message)} characters: {error.message[:200]}"
    except KeyboardInterrupt:
        raise
    except BaseException:  # panics of Rust are no Exceptions
        return traceback.format_exc()
    return ""


def batch(kind: Kind, seeds: range) -> Iterator[tuple[int, str]]:
    """Seeds with what came out that may not. A process makes the executions, another goes on after a crash."""
    while seeds:
        last = seeds.start
        read, write = os.pipe()
        if not (child := os.fork()):
            os.close(read)
            _work(kind, seeds, write)
        os.close(write)
        with open(read, encoding="utf-8", errors="replace") as said:
            for line in said:
                number, _, problem = line.partition(" ")
                last = int(number)
                if problem.strip():
                    yield last, problem.strip().replace("\v", "\n")
        _, status = os.waitpid(child, 0)
        if not status:
            return
        if os.WIFSIGNALED(status):
            yield last, f"ended by {signal.Signals(os.WTERMSIG(status)).name} (SIGPROF: more than {_SECONDS} s)"
        else:
            yield last, f"ended with status {os.waitstatus_to_exitcode(status)}"
        seeds = range(last + 1, seeds.stop)


def _work(kind: Kind, seeds: range, out: int) -> None:
    """Make the executions of a child, and end it."""
    faulthandler.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what decoders and panics print
    most = psutil.Process().memory_info().vms + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        for seed in seeds:
            os.write(out, f"{seed} \n".encode())
            signal.setitimer(signal.ITIMER_PROF, _SECONDS)
            signal.alarm(_WALL)
            if problem := attempt(kind, seed):
                brief = problem if len(problem) < 4000 else f"{problem[:3000]} ... {problem[-900:]}"
                lines = "\v".join(brief.splitlines())
                os.write(out, f"{seed} {lines}\n".encode("utf-8", "replace"))
        os._exit(0)
    except BaseException:
        os._exit(1)


def main() -> int:
    """Print how many executions of every kind there were, and what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20_000, metavar="N", help="executions of all kinds together")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first execution of every kind")
    parser.add_argument("--only", metavar="KIND")
    arguments = parser.parse_args()
    keep = Path(gettempdir()) / "skyrun-fuzz"
    print(environment())
    found = 0
    with TemporaryDirectory() as place, kinds_in(Path(place)) as kinds:
        if arguments.only:
            kinds = {arguments.only: kinds[arguments.only]}
        shares = sum(kind.share for kind in kinds.values())
        for name, kind in kinds.items():
            runs, start = -(-arguments.runs * kind.share // shares), time.monotonic()
            for first in range(arguments.seed, arguments.seed + runs, _BATCH):
                for seed, problem in batch(kind, range(first, min(first + _BATCH, arguments.seed + runs))):
                    found += 1
                    print(
                        f"--only {name} --seed {seed}: {problem}\nkept in {_kept(kind, name, seed, keep)}\n", flush=True
                    )
            print(f"{name:20} {runs:8} executions in {time.monotonic() - start:6.0f} s", flush=True)
    print(f"{found} found")
    return bool(found)


def _kept(kind: Kind, name: str, seed: int, keep: Path) -> Path:
    """Where the damaged file of an execution is put, to be looked at."""
    random = Random(seed)
    sample = random.choice(kind.samples)
    keep.mkdir(exist_ok=True)
    path = keep / f"{name}-{seed}-{sample.path.name}"
    path.write_bytes(sample.damage(sample.data, random))
    return path


if __name__ == "__main__":
    sys.exit(main())
