"""A command that torch's launcher has started, once for each device, on one or several machines: torchrun -m skyrun.

Rank 0 runs the command; the others do what it hands over: their part of a clip, of which they say only what fails, or
clips of their own.
"""

from argparse import Namespace
from collections.abc import Callable

from skyrun.cli.console import show_error
from skyrun.engine.recovery import end_of_all
from skyrun.errors import OutOfMemory, SkyrunError
from skyrun.parallel.group import Group, joined, stated_place
from skyrun.pipelines.stages import follow
from skyrun.presets import Plan
from skyrun.streaming.device import choose_device


def launched(arguments: Namespace, command: Callable[[Namespace], int]) -> int:
    """Run a command as the one process that there is, or as one of those that torch's launcher has started.

    Raises SkyrunError if the command asks for another number of devices than there are processes.
    """
    place = stated_place()
    if place is None:
        return command(arguments)
    rank, size = place.rank, place.size
    if arguments.devices not in (None, size):
        hint = f"leave it out, or start {arguments.devices} processes"
        raise SkyrunError(f"--devices {arguments.devices}: the launcher has started {size} processes", hint)
    if size > 1 and ":" in (arguments.device or ""):
        raise SkyrunError(f"--device {arguments.device} is one card", f"leave it out: there are {size} processes")
    arguments.devices = size
    device = choose_device(arguments.device)
    if device.type == "cuda":
        device = choose_device(f"cuda:{place.local_rank}")
    first = rank - place.local_rank
    with joined(rank, size, device, range(first, first + place.local_size)) as group:
        code = 0
        if rank == 0:
            try:
                code = command(arguments)
            except SkyrunError as error:
                if group.has_begun:  # the others are in the midst of something
                    raise
                show_error(error, arguments.json)
                code = error.code
            group.hand_over(None)
        else:
            _follow(group)
        # All at once: when one ends with another code than 0, the launcher ends the others.
        return group.hand_over(code)


def _follow(group: Group) -> None:
    """Do what rank 0 hands over."""
    plan: Plan | None = None
    try:
        for order in follow(group):
            plan = order.plan
    except OutOfMemory as error:
        raise error if plan is None else end_of_all(error, plan) from error
