"""Caches whose passes are planned on the host and carried out by compiled programs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from kvcache._checks import as_room, as_sizes
from kvcache.errors import KVCacheError

from .base import Cache
from .batch import Batch
from .latest import Progress
from .owned import Commit

PlanT = TypeVar("PlanT")
PlanT_co = TypeVar("PlanT_co", covariant=True)
StateT = TypeVar("StateT")


class Planned(NamedTuple, Generic[PlanT_co]):
    """A plan that was made, and the way to take its passes back."""

    plan: PlanT_co
    undo: Commit


def no_layers() -> KVCacheError:
    """Return the error of a plan for a cache without layers."""
    return KVCacheError(
        "a program has only the layers allocated before; there are none. Call allocate, or put "
        "every layer in a pass first."
    )


class PlanningCache(Cache, Generic[PlanT, StateT]):
    """A cache whose passes are also available as plans, for :mod:`kvcache.functional`.

    PlanT: a plan, a pytree of arrays. StateT: the buffers of all layers, another one.
    """

    @property
    def program_state(self) -> StateT:
        """Buffers of all layers, for :mod:`kvcache.functional`.

        A program consumes buffers donated to it: assign the state that it returns. That completes
        the passes planned so far.

        Raises: on assignment, ShapeError if layers, shapes or dtypes differ; nothing has changed
            then.
        """
        with self.lock:
            return self.export_programs()

    @program_state.setter
    def program_state(self, state: StateT) -> None:
        with self.lock:
            self.prepare_import(state)()

    def plan(
        self, batch: Batch | None = None, tokens: int | None = None, *, reads: bool = False
    ) -> PlanT:
        """Begin the pass of `batch`, as :meth:`start_forward` does, and return it as a plan.

        Its tokens become history when the state that the program returns is assigned to
        :attr:`program_state`. Until then more passes can be planned, each after the one before. If
        a program fails, plan its pass again, which takes this and later ones back, or call
        :meth:`abort`, which takes back all passes planned since the state was last assigned.

        batch: None for the current pass (begun by a wrapper, or changed by set_causal).
        tokens: repeat the last token up to so many, so that a program is compiled for few
            lengths. The arrays given to the program have to repeat it, too.
        reads: plan for :func:`kvcache.functional.attend` in place of `get`: the cells that the
            tokens see, and no mask. Recurrent layers plan the same either way.

        Raises: as start_forward; ValueError for more tokens than `tokens`, NotSupportedError for
            a reserve pass, KVCacheError before any layer was allocated.
        """
        count = self.tokens_begun() if batch is None else len(batch)
        tokens = None if tokens is None else as_room(tokens, "tokens")
        if tokens is not None and tokens < count:
            raise ValueError(f"a pass is padded to its length or more; got {tokens} for {count}.")
        with self.lock:
            if batch is None:
                return self.plan_begun(tokens, reads)
            self._go_on_from_plans(batch)
            undo = self.pass_savepoint()
            try:
                self.begin_pass(batch, reserve=False)
                plan = self.plan_begun(tokens, reads)
                self._check_layers()
            except BaseException:
                undo()
                raise
            return plan

    def plan_steps(self, batch: Batch, steps: int, *, reads: bool = False) -> PlanT:
        """Return the plans of `steps` decode steps: `batch`, then its positions + 1, and so on.

        Every leaf of the plan has one more axis in front, the steps, for ``lax.scan`` or a loop.
        The passes become history as for :meth:`plan`, and `reads` is as there.

        Raises: CacheFullError if a step does not fit; ValueError if `batch` has two tokens of one
            sequence, or a token that does not come after its last; KVCacheError before any layer
            was allocated. Nothing has changed then.
        """
        [steps] = as_sizes(steps=steps)
        with self.lock:
            self._go_on_from_plans(batch)
            planned = self.begin_steps(batch, steps, reads)
            try:
                self._check_layers()
            except BaseException:
                planned.undo()
                raise
            return planned.plan

    def _check_layers(self) -> None:
        """Raise KVCacheError if a pass was planned for no layer at all: nobody will finish it."""
        if self.pass_progress() is Progress.BLANK:
            raise no_layers()

    def _go_on_from_plans(self, batch: Batch) -> None:
        """Take back what the passes of a new plan do not go on from: unfinished or failed ones."""
        if self.has_plans():
            self.prepare_replan(batch)()
        else:
            self.take_back_unfinished()

    # Hooks, called with the lock held.

    @abstractmethod
    def export_programs(self) -> StateT:
        """Return the state of :attr:`program_state`."""

    @abstractmethod
    def prepare_import(self, state: StateT) -> Commit:
        """Check a state assigned to :attr:`program_state` and return the commit to take it over.

        Cut off by an interrupt, the commit leaves passes planned, and the same state to be assigned
        again: programs have written to no place that is history.
        """

    @abstractmethod
    def has_plans(self) -> bool:
        """Return whether passes were planned since the state was last assigned."""

    @abstractmethod
    def prepare_replan(self, batch: Batch) -> Commit:
        """Return a commit to take back planned passes with tokens of `batch`, and later ones.

        A token planned again means that the program of its pass has failed.
        """

    @abstractmethod
    def tokens_begun(self) -> int:
        """Return the number of tokens of the current pass. Raises: KVCacheError without one."""

    @abstractmethod
    def pass_savepoint(self) -> Callable[[], None]:
        """Return a function to take back the pass begun from here on, if any."""

    @abstractmethod
    def plan_begun(self, tokens: int | None, reads: bool) -> PlanT:
        """Return the plan of the current pass, padded to `tokens`, and count it as planned.

        reads: see :meth:`plan`.

        Raises: NotSupportedError for a reserve pass.
        """

    @abstractmethod
    def begin_steps(self, batch: Batch, steps: int, reads: bool) -> Planned[PlanT]:
        """Begin so many decode steps, and return their plan; see :meth:`plan_steps`."""
