"""Make a plan from the hardware and the workload. A leaf: it imports nothing else of skyrun and handles no tensors."""

from skyrun.presets.machine.hardware import Hardware, probe
from skyrun.presets.plan import Plan, StagePlan, choose
from skyrun.presets.workload import Candidate, Workload

__all__ = ["Candidate", "Hardware", "Plan", "StagePlan", "Workload", "choose", "probe"]
