"""Benchmarks: the cost of our caches beside the raw framework call and the caches of others.

Frameworks are imported when they are measured, rich and matplotlib when they are asked for.
A folder per benchmark stands on `frameworks`, the raw calls, and `harness`, the common parts.
"""

from kvcache.bench.append.report import AppendReport, Timing
from kvcache.bench.append.run import CAPACITIES, DTYPES, ROUNDS, installed_backends, run_append
from kvcache.bench.append.targets import Verdict
from kvcache.bench.attend.report import AttendReport, AttendTiming
from kvcache.bench.attend.run import run_attend
from kvcache.bench.diffusion.report import DiffusionReport, DiffusionTiming
from kvcache.bench.diffusion.run import run_diffusion, toy_model
from kvcache.bench.harness.report import Judgement, Skipped
from kvcache.bench.plan.report import LOADS, Load, PlanReport, PlanTiming, PlanVerdict
from kvcache.bench.plan.run import run_plan
from kvcache.bench.prefix.report import PrefixReport, PrefixTiming
from kvcache.bench.prefix.run import run_prefix
from kvcache.bench.state.report import StateReport, StateTiming
from kvcache.bench.state.run import run_state
from kvcache.bench.step.report import StepReport, StepTiming
from kvcache.bench.step.run import run_step
from kvcache.bench.store.report import StoreReport, StoreTiming
from kvcache.bench.store.run import run_store

__all__ = [
    "CAPACITIES",
    "DTYPES",
    "LOADS",
    "ROUNDS",
    "AppendReport",
    "AttendReport",
    "AttendTiming",
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
    "StateReport",
    "StateTiming",
    "StepReport",
    "StepTiming",
    "StoreReport",
    "StoreTiming",
    "Timing",
    "Verdict",
    "installed_backends",
    "run_append",
    "run_attend",
    "run_diffusion",
    "run_plan",
    "run_prefix",
    "run_state",
    "run_step",
    "run_store",
    "toy_model",
]
