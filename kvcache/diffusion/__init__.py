"""Caches across denoising steps: skip steps of a diffusion model, and predict their outputs.

Four parts, each replaceable: a signal measures how much has changed, a policy decides from it
whether to compute, a predictor gives the output of a step that is not computed, and the scope is
whatever of the network is passed to the cache: all of it, a range of blocks, or a branch.

``recipe``        a policy, a predictor and limits; :meth:`Recipe.decide`, the one decision
``policies``      when to compute: by interval, mask, threshold, sum of changes, magnitude
``predictors``    the outputs of a skipped step: held, or extrapolated
``signals``       how much has changed; ``measurement`` brings that number to the host
``scopes``        a range of blocks as the part that may be skipped
``history``       results of the last computed steps at one site, and predictions from them
``step``          one step, eagerly: computed or predicted, site by site
``cache``         a recipe at work, eagerly, on any framework
``traced``        the same in a compiled program; ``traced_state`` is its state, a pytree
``recorder``      measures a model in runs without a cache
``calibration``   its measurements, and their file
``step_cache``    storage of features of layers, for a loop that decides itself
``tea_cache``     decisions over timesteps, for a loop that calls its network itself
``streams``       passes through one network that are kept apart
``stats``         hits and misses, and records of steps
``scalars``       numbers of decisions, on the host and in a program

Nothing here knows a framework or a model.
"""

from .cache import DiffusionCache
from .calibration import Calibration
from .policies import TIMESTEP, Accumulated, Interval, Magnitude, SkipPolicy, StepMask, Threshold
from .predictors import HoldOutput, HoldResidual, Predictor, Taylor
from .recipe import Limits, Recipe
from .recorder import Recorder
from .scopes import BlockRange
from .signals import RelativeChange, Signal, TimestepChange
from .stats import DiffusionStats, HitStats, StepRecord
from .step import Step
from .step_cache import StepCache
from .tea_cache import TeaCache
from .traced import TracedCache, TracedStep
from .traced_state import TracedState

__all__ = [
    "TIMESTEP",
    "Accumulated",
    "BlockRange",
    "Calibration",
    "DiffusionCache",
    "DiffusionStats",
    "HitStats",
    "HoldOutput",
    "HoldResidual",
    "Interval",
    "Limits",
    "Magnitude",
    "Predictor",
    "Recipe",
    "Recorder",
    "RelativeChange",
    "Signal",
    "SkipPolicy",
    "Step",
    "StepCache",
    "StepMask",
    "StepRecord",
    "Taylor",
    "TeaCache",
    "Threshold",
    "TimestepChange",
    "TracedCache",
    "TracedState",
    "TracedStep",
]
