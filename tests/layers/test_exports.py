"""What kvcache offers, by name: a change of this list is a change for every user."""

import inspect

import pytest

import kvcache
import kvcache.backends
import kvcache.errors

PUBLIC = [
    "Backend",
    "BackendInfo",
    "BackendNotAvailableError",
    "Batch",
    "BoundsError",
    "Cache",
    "CacheConfig",
    "CacheFileError",
    "CacheFullError",
    "CausalCache",
    "DTypeError",
    "DamagedFileError",
    "DiffusionCache",
    "DiffusionCacheError",
    "EncoderCache",
    "EndpointError",
    "ExportedError",
    "FileAccessError",
    "ForeignFileError",
    "KVCache",
    "KVCacheError",
    "LayerCaches",
    "NewerFileError",
    "NotSupportedError",
    "PageError",
    "PrefixCache",
    "RecurrentCache",
    "RoPEShift",
    "RotatingKVCache",
    "ShapeError",
    "SharedCellsError",
    "Snapshot",
    "SnapshotMismatchError",
    "StateCache",
    "StateError",
    "StepOrderError",
    "StoreError",
    "TracedArrayError",
    "TrimError",
    "UnknownBackendError",
    "UnknownStreamError",
    "WrapperCache",
    "available_backends",
    "backend_of",
    "get_backend",
    "register_backend",
]
# What models, runners and caches of other packages may use of a cache.
SHARED = """
backend can_trim capture check_not_exported check_rollback check_select check_trim checkpoint concat
copy cuts dtype export_state from_layer import_state kind last_trimmable load make nbytes
offset options pad padding reserve reset restore restore_rows rewound rollback rows save savepoint
schedule select snapshot split state to_backend to_layer trim visibility
""".split()
CACHE = [*SHARED, *"fill growths len mask next_positions positions state_positions update".split()]
ROTATING = ["keep", "max_size", "slack"]
STATES = ["advance", "kept", "record"]
LAYERS = """
can_trim checkpoint concat copy count cuts index last_trimmable load nbytes offset pad reserve reset
restore rollback save schedule select snapshot split to_backend trim
""".split()
BACKEND = """
alloc alloc_axes array_types assignment_rebinds attention attention_block attention_in_blocks
attention_of_runs attention_size check_type compile concat config detached device device_of devices
dtype dtype_name dtypes evaluate fast_key free from_dlpack from_host from_host_axes from_traced
from_traced_forms gather import_dlpack in_host_memory is_deleted is_traced merge_attention modules
moved_by name owned owns read_costs read_rows read_slice read_slices replace_nonfinite requires_grad
row_copier row_index scatter shared slice slice_update slices_are_views spec sync to_host
traced_append traced_attention traced_cond traced_form traced_forms traced_index traced_range
traced_read traced_read_rows traced_replace_nonfinite traced_write traced_zeros whole_beside
with_gradients write_finite_row_sets write_finite_slices write_row_sets write_rows write_slice
write_slices xp
""".split()


def test_names():
    assert kvcache.__all__ == PUBLIC
    assert all(hasattr(kvcache, name) for name in PUBLIC)


def test_nothing_else_is_public():
    found = {
        name
        for name, member in vars(kvcache).items()
        if not name.startswith("_") and not inspect.ismodule(member)
    }
    assert found == set(PUBLIC)


def test_star_import():
    namespace = {}
    exec("from kvcache import *", namespace)  # a star is allowed at module level only
    assert set(namespace) - {"__builtins__"} == set(PUBLIC)


def members(kind):
    return {name for name in dir(kind) if not name.startswith("_")}


def test_members_of_the_caches():
    assert members(kvcache.KVCache) == set(CACHE)
    ring = kvcache.RotatingKVCache(2)
    assert {name for name in dir(ring) if not name.startswith("_")} == {*CACHE, *ROTATING}
    assert members(kvcache.StateCache) == {*SHARED, *STATES}
    assert members(kvcache.LayerCaches) == set(LAYERS)


def test_members_of_a_backend():
    assert members(type(kvcache.get_backend("numpy"))) | {"device"} == set(BACKEND)


def public_objects():
    for name in PUBLIC:
        member = getattr(kvcache, name)
        yield name, member
        if inspect.isclass(member):
            for inner, value in vars(member).items():
                is_code = inspect.isroutine(value) or isinstance(value, property)
                if is_code and not inner.startswith("_"):
                    yield f"{name}.{inner}", value


OBJECTS = dict(public_objects())


@pytest.mark.parametrize("name", OBJECTS)
def test_has_a_docstring(name):
    """A method that overrides another may leave it to that one."""
    doc = inspect.getdoc(OBJECTS[name])
    owner, _, method = name.partition(".")
    if not doc and method:
        doc = inspect.getdoc(getattr(getattr(kvcache, owner), method))
    assert doc, f"{name} has no docstring"
    assert doc[0].isupper() or doc[0] in "`:", f"{name}: {doc}"


def test_errors_are_drawn_where_they_are_defined():
    """The tree at the top of errors.py names every error, and no other."""
    tree = kvcache.errors.__doc__ or ""
    drawn = {word for word in tree.split() if word.endswith("Error")}
    errors = {
        name
        for name, error in vars(kvcache.errors).items()
        if inspect.isclass(error) and issubclass(error, Exception)
    }
    assert errors == drawn
    assert errors <= set(PUBLIC)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (kvcache.BackendNotAvailableError, ImportError),
        (kvcache.UnknownBackendError, ValueError),
        (kvcache.BoundsError, IndexError),
        (kvcache.UnknownStreamError, LookupError),
        (kvcache.DiffusionCacheError, ValueError),
        (kvcache.ShapeError, ValueError),
        (kvcache.DTypeError, TypeError),
        (kvcache.TracedArrayError, TypeError),
        (kvcache.ExportedError, RuntimeError),
        (kvcache.StateError, ValueError),
        (kvcache.TrimError, ValueError),
        (kvcache.CacheFullError, RuntimeError),
        (kvcache.NotSupportedError, NotImplementedError),
        (kvcache.SharedCellsError, RuntimeError),
        (kvcache.SnapshotMismatchError, ValueError),
        (kvcache.CacheFileError, OSError),
    ],
)
def test_errors_are_builtins_too(error, builtin):
    assert issubclass(error, kvcache.KVCacheError)
    assert issubclass(error, builtin)


def test_backends_offers_its_own_part():
    shared = set(kvcache.backends.__all__) & set(PUBLIC)
    assert "Backend" in shared
    for name in shared:
        assert getattr(kvcache.backends, name) is getattr(kvcache, name)
