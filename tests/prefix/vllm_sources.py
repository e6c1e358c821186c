"""Modules of vLLM from its sources alone: what they import besides one another is left out.

$KVCACHE_VLLM has the sources, as `nox -s engines` unpacks them; no part of vLLM is installed.
"""

import importlib
import importlib.abc
import importlib.util
import os
import sys
import types
from pathlib import Path
from unittest import mock

import pytest

REAL = {"vllm.distributed.kv_events", "vllm.v1.core.kv_cache_utils", "vllm.utils.hashing"}


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the modules of interest, and empty ones in the place of all others of vLLM."""

    def __init__(self, root):
        self.root = root

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] != "vllm":
            return None
        if name in REAL:
            file = self.root.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        module.__path__ = []


class Empty(types.ModuleType):
    """A module that has whatever is asked for."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=f"{self.__name__}.{name}")


def load():
    """The classes of events, the functions that hash blocks, and hash functions."""
    root = os.environ.get("KVCACHE_VLLM")
    if not root:
        pytest.skip("the sources of vLLM are not here: nox -s engines")
    finder = Finder(Path(root))
    sys.meta_path.insert(0, finder)
    try:
        modules = [importlib.import_module(name) for name in sorted(REAL)]
    finally:
        sys.meta_path.remove(finder)
    return modules


def request_of(ids, salt, media, adapter):
    """A request, as far as the functions that hash its blocks look at it."""
    lora = types.SimpleNamespace(lora_name=adapter[0], lora_path=adapter[1]) if adapter else None
    features = [
        types.SimpleNamespace(
            identifier=name, mm_position=types.SimpleNamespace(offset=start, length=stop - start)
        )
        for start, stop, name in sorted(media)
    ]
    return types.SimpleNamespace(
        all_token_ids=list(ids),
        block_hashes=[],
        cache_salt=salt or None,
        lora_request=lora,
        mm_features=features,
        num_tokens=len(ids),
        prompt_embeds=None,
    )


class Recipe:
    """The hashes and extra keys that vLLM computes for the blocks of a sequence."""

    def __init__(self, hashing, utils):
        self.hash, self.utils = hashing.sha256_cbor, utils

    def hashes(self, ids, salt="", namespace="", size=16, media=(), adapter=()):
        """Of all full blocks. namespace: the seed, "" for vLLM's own."""
        with mock.patch.dict(os.environ):
            os.environ.pop("PYTHONHASHSEED", None)
            if namespace:
                os.environ["PYTHONHASHSEED"] = namespace
            self.utils.init_none_hash(self.hash)
        hasher = self.utils.get_request_block_hasher(size, self.hash)
        return hasher(request_of(ids, salt, media, adapter))

    def extra_keys(self, ids, salt="", size=16, media=(), adapter=()):
        """As events have them, of all full blocks."""
        request, index, keys = request_of(ids, salt, media, adapter), 0, []
        for start in range(0, len(ids) - size + 1, size):
            block_keys, index = self.utils.generate_block_hash_extra_keys(
                request, start, start + size, index
            )
            keys.append(block_keys)
        return self.utils.to_event_extra_keys(keys)
