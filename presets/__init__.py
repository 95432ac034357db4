"""Hardware and workload to a plan. A leaf: it imports nothing of skyrun and sees no tensor."""

from skyrun.presets.hardware import Hardware, probe
from skyrun.presets.plan import Plan, StagePlan, choose
from skyrun.presets.workload import Candidate, Workload

__all__ = ["Candidate", "Hardware", "Plan", "StagePlan", "Workload", "choose", "probe"]
