"""The errors of the reference models: drawn where they are defined, and builtins too."""

import inspect

import pytest

import kvcache
from kvcache.reference import errors
from kvcache.reference.errors import AudioFileError, ModelFileError, UnsupportedModelError


def test_drawn_where_they_are_defined():
    """The tree at the top of the module names every error, and no other."""
    drawn = {word for word in errors.__doc__.split() if word.endswith("Error")}
    defined = {
        name
        for name, member in vars(errors).items()
        if inspect.isclass(member) and issubclass(member, Exception)
    }
    assert drawn - {"(OSError)", "(ValueError)"} == defined


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ModelFileError, OSError),
        (UnsupportedModelError, ValueError),
        (AudioFileError, OSError),
    ],
)
def test_are_builtins_too(error, builtin):
    assert issubclass(error, kvcache.KVCacheError)
    assert issubclass(error, builtin)


def test_are_none_of_the_errors_of_a_cache():
    for name in ("ModelFileError", "UnsupportedModelError", "AudioFileError"):
        assert not hasattr(kvcache, name)
        assert not hasattr(kvcache.errors, name)
