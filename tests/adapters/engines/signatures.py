"""Signatures of an engine's classes beside those that its adapter was written for."""

import inspect


def moved(owner, recorded):
    """Return, for each call that has another signature than recorded, both of them."""
    changed = []
    for name, wanted in recorded.items():
        method = inspect.getattr_static(owner, name, None)
        parameters = parameters_of(method)
        if parameters != wanted:
            changed.append(f"{owner.__name__}.{name}({wanted}) has become ({parameters})")
    return changed


def parameters_of(method):
    function = getattr(method, "__func__", method)
    if not callable(function):
        return f"{method}"
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return ", ".join(
        parameter.name if parameter.default is parameter.empty else f"{parameter.name}="
        for parameter in parameters
    )


def abstract_calls(owner):
    """Return the calls that an engine leaves to its subclasses."""
    return sorted(owner.__abstractmethods__)
