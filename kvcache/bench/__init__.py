"""Benchmarks: what our caches cost beside the raw framework call and the caches of others.

Frameworks are imported when they are measured, rich and matplotlib when they are asked for.
"""

from ._diffusion_report import DiffusionReport, DiffusionTiming
from ._plan_report import LOADS, Load, PlanReport, PlanTiming, PlanVerdict
from ._prefix_report import PrefixReport, PrefixTiming
from ._step_report import StepReport, StepTiming
from .append import CAPACITIES, DTYPES, ROUNDS, installed_backends, run_append
from .diffusion import run_diffusion, toy_model
from .plan import run_plan
from .prefix import run_prefix
from .record import Judgement, Skipped
from .report import AppendReport, Timing
from .step import run_step
from .targets import Verdict

__all__ = [
    "CAPACITIES",
    "DTYPES",
    "LOADS",
    "ROUNDS",
    "AppendReport",
    "DiffusionReport",
    "DiffusionTiming",
    "Judgement",
    "Load",
    "PlanReport",
    "PlanTiming",
    "PlanVerdict",
    "PrefixReport",
    "PrefixTiming",
    "Skipped",
    "StepReport",
    "StepTiming",
    "Timing",
    "Verdict",
    "installed_backends",
    "run_append",
    "run_diffusion",
    "run_plan",
    "run_prefix",
    "run_step",
    "toy_model",
]
