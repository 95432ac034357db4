"""`skyrun doctor`: check what decides speed or failure on this machine."""

from argparse import Namespace

from skyrun.cli.console import display, emit
from skyrun.errors import FAILED
from skyrun.planning.config import read_config
from skyrun.tools.doctor import examine


def execute(arguments: Namespace) -> int:
    """Check the machine. Exit code 1 if something will fail."""
    findings, config = examine(), read_config()
    if arguments.json:
        emit({"findings": [finding.as_json() for finding in findings], "config": config.as_json()})
    else:
        for finding in findings:
            display(finding.text())
        display(config.text())
    return FAILED if any(finding.verdict == "fails" for finding in findings) else 0
