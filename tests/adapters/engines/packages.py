"""vLLM's modules of tiers, without the packages around them that import the whole server.

Modules are the real ones. Of four packages, only the code that runs at their beginning is left out:
it imports all connectors, and with them schedulers, parsers and samplers.
"""

import importlib
import importlib.util
import os
import sys
import types

import pytest

ROOT = "vllm.distributed.kv_transfer"
PACKAGES = ("", ".kv_connector", ".kv_connector.v1", ".kv_connector.v1.offloading")
NAMES = ("KVConnectorBase_V1", "KVConnectorRole", "SupportsHMA", "supports_hma")
"""What one of them has of its module `base`."""


def import_tiers():
    """Return vLLM's module of the manager of tiers.

    Raises: ImportError if vLLM or a package that its modules need is missing.
    """
    if ROOT not in sys.modules:
        import vllm.distributed  # noqa: F401

        for package in PACKAGES:
            _begin_empty(ROOT + package)
        connectors = sys.modules[f"{ROOT}.kv_connector.v1"]
        base = importlib.import_module(f"{ROOT}.kv_connector.v1.base")
        vars(connectors).update({name: getattr(base, name) for name in NAMES})
    return importlib.import_module("vllm.v1.kv_offload.tiering.manager")


def imported_or_skipped(importer, name):
    """Return what an importer returns; skip the test without it, except in `nox -s engines`."""
    try:
        return importer()
    except ImportError as error:
        if os.environ.get("KVCACHE_ENGINES"):
            raise
        pytest.skip(f"could not import {name}: {error}")


def _begin_empty(name):
    spec = importlib.util.find_spec(name)
    package = types.ModuleType(name)
    package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    setattr(sys.modules[parent], child, package)
