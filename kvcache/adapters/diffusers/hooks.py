"""The hooks of diffusers, by which it has its own caches called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch.nn import Module

from kvcache.errors import NotSupportedError

NAME = "kvcache"

Around: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Called in place of a forward: with that forward, and what it was called with."""


class Context(StateManager):
    """What ``transformer.cache_context(...)`` has set: the pass that is being made."""

    def __init__(self) -> None:
        super().__init__(BaseState())
        self.name: str | None = None
        """None outside of any context."""
        self.step: int | None = None
        """The number of the step, where the pipeline tells it."""

    def set_context(self, context: Any) -> None:
        # Earlier releases give the bare name.
        self.name = getattr(context, "name", context)
        self.step = getattr(context, "step_index", None)

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.set_context(None)


class Hook(ModelHook):
    """Calls `around` in place of a forward."""

    def __init__(self, around: Around) -> None:
        self.fn_ref: Any = None  # set by diffusers
        self._around = around

    def new_forward(self, module: Module, *args: Any, **kwargs: Any) -> Any:
        """Called by diffusers in place of the forward of `module`."""
        return self._around(self.fn_ref.original_forward, args, kwargs)


class RootHook(Hook):
    """On a transformer: is told of contexts, and of the end of a pipeline's run."""

    _is_stateful = True

    def __init__(self, around: Around, ended: Callable[[], None]) -> None:
        super().__init__(around)
        self.context = Context()  # diffusers looks for it among the attributes
        self._ended = ended

    def reset_state(self, module: Module) -> Module:
        self.context.reset()
        self._ended()
        return module


def check_free(transformer: Module) -> None:
    """Raises NotSupportedError if a cache is attached to `transformer`, ours or theirs."""
    if HookRegistry.check_if_exists_or_initialize(transformer).get_hook(NAME) is not None:
        raise NotSupportedError(
            "a transformer takes one cache; this one has one of kvcache. Call detach() of what "
            "attach() returned."
        )
    check_no_other(transformer)


def check_no_other(transformer: Module) -> None:
    """Raises NotSupportedError if a cache of diffusers is enabled on `transformer`."""
    if getattr(transformer, "is_cache_enabled", False):
        raise NotSupportedError(
            "a transformer takes one cache; this one has one of diffusers. Call "
            "transformer.disable_cache()."
        )


def register(module: Module, hook: Hook) -> None:
    """Wrap the forward of `module`."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, NAME)


def remove(modules: Sequence[Module]) -> None:
    """Take our hooks off `modules`, and nobody else's."""
    for module in modules:
        HookRegistry.check_if_exists_or_initialize(module).remove_hook(NAME, recurse=False)
        # diffusers puts back the method as an attribute, which hides later changes of the class.
        if module.__dict__.get("forward") == type(module).forward.__get__(module):
            del module.forward
