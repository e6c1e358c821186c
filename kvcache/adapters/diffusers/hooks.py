"""The hooks of diffusers, made for its own caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch.nn import Module

from kvcache.errors import NotSupportedError

NAME = "kvcache"

Forward: TypeAlias = Callable[..., object]
"""The forward of a transformer, or of one of its blocks."""
Args: TypeAlias = tuple[object, ...]
"""Positional arguments of a forward."""
Kwargs: TypeAlias = dict[str, object]
"""Keyword arguments of a forward."""
Around: TypeAlias = Callable[[Forward, Args, Kwargs], object]
"""Called in place of a forward: with that forward and its arguments."""


class Context(StateManager):
    """The context set by ``transformer.cache_context(...)``: the present pass."""

    def __init__(self) -> None:
        super().__init__(BaseState())
        self.name: str | None = None
        """None outside of any context."""
        self.step: int | None = None
        """The number of the step, where the pipeline tells it."""

    def set_context(self, context: object) -> None:
        # Earlier releases give the bare name.
        self.name = cast(str | None, getattr(context, "name", context))
        self.step = getattr(context, "step_index", None)

    def reset(self, *args: object, **kwargs: object) -> None:
        self.set_context(None)


class Hook(ModelHook):
    """Calls `around` in place of a forward."""

    def __init__(self, around: Around) -> None:
        # Set by diffusers, which gives None as the type of the functions in it.
        self.fn_ref: Any = None
        self._around = around

    def new_forward(self, module: Module, *args: object, **kwargs: object) -> object:
        """Run in place of the forward of `module`; diffusers calls this."""
        return self._around(self.fn_ref.original_forward, args, kwargs)


class RootHook(Hook):
    """Hook of a transformer: is told of contexts, and of the end of a pipeline's run."""

    _is_stateful = True

    def __init__(self, around: Around, on_end: Callable[[], None]) -> None:
        super().__init__(around)
        self.context = Context()  # diffusers looks for it among the attributes
        self._on_end = on_end

    def reset_state(self, module: Module) -> Module:
        self.context.reset()
        self._on_end()
        return module


def check_free(transformer: Module) -> None:
    """Raise NotSupportedError if a cache is attached to `transformer`, ours or theirs."""
    if HookRegistry.check_if_exists_or_initialize(transformer).get_hook(NAME) is not None:
        raise NotSupportedError(
            "a transformer takes one cache; this one has one of kvcache. Call detach() of what "
            "attach() returned."
        )
    check_no_other(transformer)


def check_no_other(transformer: Module) -> None:
    """Raise NotSupportedError if a cache of diffusers is enabled on `transformer`."""
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
