"""Caches across denoising steps: what one step of a diffusion model leaves to the next.

Four parts, each replaceable: a signal measures how much has changed, a policy decides from it
whether to compute, a predictor gives the output of a step that is not computed, and the scope is
whatever of the network is passed to the cache: all of it, a range of blocks, or a branch.

Nothing here knows a framework or a model.
"""

from .cache import DiffusionCache, DiffusionStats, StepRecord
from .calibration import Calibration, Recorder
from .policies import TIMESTEP, Accumulated, Interval, Magnitude, Policy, StepMask, Threshold
from .predictors import HoldOutput, HoldResidual, Predictor, Taylor
from .recipe import Limits, Recipe
from .scopes import BlockRange
from .signals import RelativeChange, Signal, TimestepChange
from .step import Step
from .step_cache import StepCache, StepStats
from .tea_cache import TeaCache, TeaStats
from .traced import TracedCache, TracedState, TracedStep

__all__ = [
    "TIMESTEP",
    "Accumulated",
    "BlockRange",
    "Calibration",
    "DiffusionCache",
    "DiffusionStats",
    "HoldOutput",
    "HoldResidual",
    "Interval",
    "Limits",
    "Magnitude",
    "Policy",
    "Predictor",
    "Recipe",
    "Recorder",
    "RelativeChange",
    "Signal",
    "Step",
    "StepCache",
    "StepMask",
    "StepRecord",
    "StepStats",
    "Taylor",
    "TeaCache",
    "TeaStats",
    "Threshold",
    "TimestepChange",
    "TracedCache",
    "TracedState",
    "TracedStep",
]
