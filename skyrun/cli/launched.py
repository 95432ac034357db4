"""A command that torch's launcher has started, once for each device, on one or several machines: torchrun -m skyrun.

Rank 0 runs the command; the others do what it hands over, and say only what fails.
"""

from argparse import Namespace
from collections.abc import Callable

import torch

from skyrun.errors import SkyrunError
from skyrun.parallel.group import joined, stated_rank
from skyrun.pipelines.stages import follow
from skyrun.streaming.device import choose_device, devices_here


def launched(arguments: Namespace, command: Callable[[Namespace], int]) -> int:
    """Run a command as the one process that there is, or as one of those that torch's launcher has started.

    Raises SkyrunError if the command asks for another number of devices than there are processes.
    """
    stated = stated_rank()
    if stated is None:
        return command(arguments)
    rank, size, local = stated
    if arguments.devices not in (None, size):
        hint = f"leave it out, or start {arguments.devices} processes"
        raise SkyrunError(f"--devices {arguments.devices}: the launcher has started {size} processes", hint)
    if size > 1 and ":" in (arguments.device or ""):
        raise SkyrunError(f"--device {arguments.device} is one card", f"leave it out: there are {size} processes")
    arguments.devices = size
    device = choose_device(arguments.device)
    if device.type == "cuda":
        device = choose_device(f"cuda:{local}")
    first = rank - local
    with joined(rank, size, device, range(first, first + devices_here(size))) as group:
        if rank > 0:
            with torch.inference_mode():
                for _ in follow(group):
                    pass
            return 0
        code = command(arguments)
        group.hand_over(None)
        return code
