"""Finding a backend: by name, by device, by array; and what is said when it is not there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvcache
from kvcache import (
    Backend,
    BackendNotAvailableError,
    KVCache,
    UnknownBackendError,
    available_backends,
    backend_of,
    get_backend,
    register_backend,
)
from kvcache.backends._numpy import NumpyBackend

# Of the tests that depend on what else is installed; the others run once, where NumPy is alone.
installation = pytest.mark.installation
FRAMEWORKS = ("jax", "mlx", "torch")
BUILT_IN = ["array_api", "jax", "mlx", "numpy", "torch"]

# What a program sees where some packages were never installed: no finder has heard of them.
WITHOUT = """
import sys

class Without:
    def __init__(self, finder, missing):
        self.finder, self.missing = finder, missing
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.missing:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

def without(*missing):
    sys.meta_path[:] = [Without(finder, missing) for finder in sys.meta_path]
"""


def run(program, *path, **environment):
    """Runs a program in an interpreter of its own, `path` importable; returns what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "KVCACHE_BACKEND"}
    before = filter(None, [env.get("PYTHONPATH")])
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path), *before])
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(
        command, env=env | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# By name.


@installation
def test_every_installed_backend_by_name(backend):
    assert isinstance(get_backend(backend.spec), Backend)
    assert get_backend(backend.spec).name == backend.name
    assert get_backend(backend) is backend
    assert get_backend(backend.name, device=backend.device).spec == backend.spec


@pytest.mark.parametrize("name", ["tensorflow", "Torch", "", "numpy ", "cuda"])
def test_unknown_name(name):
    with pytest.raises(
        UnknownBackendError, match=rf"no backend is called '{name}'; there are array_api, .*torch"
    ):
        get_backend(name)
    with pytest.raises(UnknownBackendError, match="register_backend adds others"):
        KVCache(name)


@pytest.mark.parametrize("name", [None, 3, np.zeros(1), NumpyBackend])
def test_no_name_at_all(name):
    with pytest.raises(UnknownBackendError, match="named by a string; got "):
        get_backend(name)


@installation
@pytest.mark.parametrize(
    "spec", ["torch:cuda:7", "torch:tpu", "jax:gpu:9", "jax:abacus", "mlx:abacus", "numpy:cuda"]
)
def test_a_device_that_is_not_here(spec):
    name, _, device = spec.partition(":")
    if name != "numpy" and not importlib.util.find_spec(name):
        pytest.skip(f"{name} is not installed")
    with pytest.raises(BackendNotAvailableError, match=f"'{device}'.*cpu|default device.*{device}"):
        get_backend(spec)
    with pytest.raises(ImportError, match=device):
        get_backend(name, device=device)


def test_two_devices_are_one_too_many():
    with pytest.raises(UnknownBackendError, match=r"name one device; got 'numpy:cpu' and"):
        get_backend("numpy:cpu", device="cuda")


@pytest.mark.parametrize("library", ["no_such_library", "json", "a.b.c"])
def test_an_array_api_library_that_is_none(library):
    with pytest.raises(BackendNotAvailableError, match=library):
        get_backend(f"array_api:{library}")


def test_instances_are_independent_of_each_other():
    """No current backend: two kinds in one process, in any order, interleaved."""
    pytest.importorskip("array_api_strict")
    one, two = KVCache("numpy"), KVCache("array_api:array_api_strict")
    for cache in (one, two, one, two):
        assert cache.backend is not None
        part = cache.backend.alloc((1, 1, 2, 1), "float32")
        cache.update(part, part)
    assert one.backend is not two.backend
    assert (one.offset, two.offset) == (4, 4)
    assert backend_of(one.state[0]).name == "numpy"
    assert backend_of(two.state[0]).name == "array_api"


@installation
def test_all_backends_in_one_process():
    caches = [KVCache(name) for name, info in available_backends().items() if info.installed]
    for cache in caches * 2:
        assert cache.backend is not None
        part = cache.backend.from_host(np.ones((1, 1, 2, 1), np.float32))
        keys, _ = cache.update(part, part)
        # The arrays of array_api:numpy are NumPy's, which have a backend of their own.
        shared = cache.backend.spec == "array_api:numpy"
        assert backend_of(keys).name == ("numpy" if shared else cache.backend.name)


# "auto" and the environment.


def test_the_environment_chooses_for_auto(monkeypatch):
    pytest.importorskip("array_api_strict")
    monkeypatch.setenv("KVCACHE_BACKEND", "array_api:array_api_strict")
    assert get_backend().spec == get_backend("auto").spec == "array_api:array_api_strict"
    assert get_backend("numpy").name == "numpy"
    assert KVCache().backend is None
    monkeypatch.setenv("KVCACHE_BACKEND", "nonsense")
    with pytest.raises(UnknownBackendError, match="'nonsense'"):
        get_backend("auto")


@pytest.mark.parametrize("value", ["", "auto"])
def test_an_environment_that_chooses_nothing(value, monkeypatch):
    expected = get_backend("auto").spec
    monkeypatch.setenv("KVCACHE_BACKEND", value)
    assert get_backend("auto").spec == expected


@installation
def test_auto_takes_the_best_that_is_installed():
    order = ("mlx", "torch", "jax") if sys.platform == "darwin" else ("torch", "jax", "mlx")
    installed = [name for name in order if available_backends()[name].installed]
    for count in range(len(installed) + 1):
        missing = ", ".join(map(repr, installed[:count]))
        program = f"{WITHOUT}without({missing})\nimport kvcache; print(kvcache.get_backend().name)"
        assert run(program) == [*installed, "numpy"][count]


def test_auto_is_not_taken_in_by_a_folder_of_that_name(tmp_path):
    """A checkout, or somebody's data, that happens to lie on the path: it is no package."""
    for name in FRAMEWORKS:
        (tmp_path / name).mkdir()
    missing = ", ".join(map(repr, FRAMEWORKS))
    program = f"""{WITHOUT}
import importlib.machinery, kvcache, kvcache.backends, numpy, ml_dtypes, array_api_compat.numpy
sys.path[:] = [{str(tmp_path)!r}]
sys.path_importer_cache.clear()
print(kvcache.get_backend().name)
print(*(name for name, info in kvcache.available_backends().items() if info.installed))
"""
    assert run(program).splitlines()[0] == "numpy", missing


# Not installed.


@installation
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_not_installed(name):
    """In an environment of one framework this is the real thing; elsewhere it is hidden."""
    program = f"""{WITHOUT}
without({name!r})
import kvcache
for attempt in (kvcache.get_backend, kvcache.KVCache):
    try:
        attempt({name!r})
    except kvcache.BackendNotAvailableError as error:
        assert isinstance(error, ImportError)
        assert isinstance(error.__cause__, ImportError), "the reason must not be lost"
        message = str(error)
print(message)
info = kvcache.available_backends()
print(*(name for name in info if not info[name].installed))
print(info[{name!r}].reason == message, info[{name!r}].devices, repr(info[{name!r}].version))
print(info[{name!r}].remedy)
kvcache.get_backend()
cache = kvcache.KVCache("numpy")
"""
    message, missing, reported, remedy = run(program).splitlines()
    assert f"backend '{name}' needs {name}, which cannot be imported" in message
    assert message.endswith(f"Install it: pip install 'kvcache[{name}]'")
    assert remedy == f"pip install 'kvcache[{name}]'"
    assert name in missing.split()
    assert reported == "True () ''"


@installation
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_not_installed_for_real(name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed; test_not_installed hides it")
    with pytest.raises(BackendNotAvailableError, match=rf"pip install 'kvcache\[{name}\]'"):
        get_backend(name)
    assert not available_backends()[name].installed


@installation
def test_an_installation_that_is_broken(tmp_path):
    """A framework whose import fails in whatever way is one that is not available."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("raise ImportError('libmlx.so: cannot open')")
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    program = """
import kvcache
info = kvcache.available_backends()
for name in ("mlx", "torch"):
    print(info[name].installed, info[name].reason)
    try:
        kvcache.get_backend(name)
    except kvcache.BackendNotAvailableError as error:
        print(error)
print(kvcache.get_backend().name)
"""
    lines = run(program, tmp_path).splitlines()
    for line in lines[:2]:
        assert line.startswith("False") or "libmlx.so" in line
    assert sum("libmlx.so: cannot open" in line for line in lines) == 2
    assert sum("libcudart.so.12: cannot open" in line for line in lines) == 2
    assert lines[-1] in ("jax", "numpy")


@installation
def test_a_framework_that_finds_no_device():
    """JAX told to use a platform that is not here fails when asked for devices, not on import."""
    if not importlib.util.find_spec("jax"):
        pytest.skip("jax is not installed")
    program = """
import kvcache
info = kvcache.available_backends()["jax"]
print(info.installed)
print(info.reason.replace("\\n", " "))
try:
    kvcache.get_backend("jax")
except kvcache.BackendNotAvailableError as error:
    print(str(error).replace("\\n", " "))
"""
    installed, reason, error = run(program, JAX_PLATFORMS="rocm").splitlines()
    assert installed == "False"
    assert "rocm" in reason
    assert "rocm" in error


@installation
def test_available_backends(backend):
    infos = available_backends()
    assert list(infos) == sorted(infos)
    assert set(BUILT_IN) <= set(infos)
    info = infos[backend.name]
    assert info.installed
    assert info.version[0].isdigit()
    assert info.reason == ""
    assert backend.device in info.devices


# By array.


def test_owner_of_an_array(backend):
    array = backend.alloc((2, 3), "float32")
    assert backend_of(array).spec == backend.spec
    assert backend_of(array) is backend_of(array)
    assert backend.owns(array)


class Sub(np.ndarray):
    """A subclass from elsewhere is an array of its framework all the same."""


@installation
def test_owner_of_a_subclass():
    assert backend_of(np.zeros(3).view(Sub)).name == "numpy"
    if importlib.util.find_spec("torch"):
        import torch

        assert backend_of(torch.nn.Parameter(torch.zeros(3))).name == "torch"


class Foreign:
    """Says that it follows the standard, but its library is none."""

    def __array_namespace__(self, **_):
        return np


@pytest.mark.parametrize("thing", [[1.0], (1.0,), 1.0, "array", None, object(), Foreign(), Foreign])
def test_nobody_owns_it(thing):
    kind = type(thing)
    name = rf"got {kind.__module__}\.{kind.__qualname__}\. register_backend adds others"
    with pytest.raises(UnknownBackendError, match=name):
        backend_of(thing)


@installation
def test_asking_for_the_owner_imports_nothing():
    program = f"""
import sys, kvcache, numpy as np
assert kvcache.backend_of(np.zeros(1)).name == "numpy"
try:
    kvcache.backend_of([1])
except kvcache.UnknownBackendError:
    pass
print(*({set(FRAMEWORKS)!r} & sys.modules.keys()))
"""
    assert run(program) == ""


# Backends of others.

PLUGIN = """
from kvcache.backends._numpy import NumpyBackend

class Arrays(list):
    "Stands for the arrays of some framework."

class AbacusBackend(NumpyBackend):
    name = "abacus"

    @staticmethod
    def device_of(array):
        return "cpu"
"""


def distribution(folder, name, entry):
    """What an installed package leaves behind, entry point included."""
    info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[kvcache.backends]\n{entry}\n")
    (info / "RECORD").write_text("")
    (info / "top_level.txt").write_text("abacus\n")


def test_an_installed_package_adds_a_backend(tmp_path):
    distribution(tmp_path, "kvcache-abacus", "abacus = abacus:AbacusBackend")
    (tmp_path / "abacus.py").write_text(PLUGIN)
    program = """
import sys, kvcache
assert "abacus" not in sys.modules, "imported before it was needed"
backend = kvcache.get_backend("abacus")
print(backend.spec, type(backend).__module__)
info = kvcache.available_backends()["abacus"]
print(info.installed, info.devices)
print(info.remedy)
from abacus import Arrays
print(kvcache.backend_of(Arrays()).name)
"""
    assert run(program, tmp_path).splitlines() == [
        "abacus:cpu abacus",
        "True ('cpu',)",
        "pip install kvcache-abacus",
        "abacus",
    ]


def test_an_installed_package_that_is_broken(tmp_path):
    """It is reported, and nobody else suffers."""
    distribution(tmp_path, "kvcache-abacus", "abacus = abacus_that_is_gone:AbacusBackend")
    program = """
import kvcache, numpy
info = kvcache.available_backends()
print(info["numpy"].installed, info["abacus"].installed)
print(info["abacus"].reason)
print(kvcache.backend_of(numpy.zeros(1)).name)
"""
    installed, reason, owner = run(program, tmp_path).splitlines()
    assert installed == "True False"
    assert reason.startswith("backend 'abacus' needs ")
    assert reason.endswith("Install it: pip install kvcache-abacus")
    assert owner == "numpy"


def test_a_package_cannot_replace_a_backend_of_ours(tmp_path):
    distribution(tmp_path, "kvcache-abacus", "numpy = abacus:AbacusBackend")
    (tmp_path / "abacus.py").write_text(PLUGIN)
    program = "import kvcache; print(type(kvcache.get_backend('numpy')).__module__)"
    assert run(program, tmp_path) == "kvcache.backends._numpy"


REGISTERED = """
import kvcache, numpy as np
kvcache.register_backend("abacus", "abacus:AbacusBackend", "abacus", "pip install beads")
"""


def test_register_backend(tmp_path):
    (tmp_path / "abacus.py").write_text(PLUGIN)
    program = f"""{REGISTERED}
import sys
assert "abacus" not in sys.modules, "imported before it was needed"
backend = kvcache.get_backend("abacus")
print(backend.spec)
from abacus import Arrays
print(kvcache.backend_of(Arrays()).name)
print("abacus" in kvcache.available_backends())
cache = kvcache.KVCache(backend)
one = backend.from_host(np.ones((1, 1, 2, 1), np.float32))
"""
    assert run(program, tmp_path).splitlines() == ["abacus:cpu", "abacus", "True"]


def test_registered_but_not_installed():
    program = f"""{REGISTERED}
try:
    kvcache.get_backend("abacus")
except kvcache.BackendNotAvailableError as error:
    print(error)
print(kvcache.available_backends()["abacus"].remedy)
"""
    message, remedy = run(program).splitlines()
    assert "backend 'abacus' needs abacus" in message
    assert message.endswith("Install it: pip install beads")
    assert remedy == "pip install beads"


def test_a_name_that_is_taken():
    with pytest.raises(UnknownBackendError, match=r"named 'numpy' exists already\. Choose another"):
        register_backend("numpy", "abacus:AbacusBackend", "abacus", "pip install beads")
    assert type(get_backend("numpy")) is NumpyBackend


# The folder `backends/`.


@pytest.mark.parametrize("name", ["backends", "elsewhere.backends"])
def test_under_another_name_it_cannot_be_imported(name):
    """In a checkout `import backends` would find it, and every class would exist twice."""
    file = kvcache.backends.__file__
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(
        ImportError, match=rf"import this package as kvcache\.backends, not as {name}"
    ):
        spec.loader.exec_module(module)


def test_import_of_the_folder():
    folder = Path(kvcache.backends.__file__).parent
    program = f"""
import sys
sys.path.insert(0, {str(folder.parent)!r})
try:
    import {folder.name}
except ImportError as error:
    print(error)
"""
    assert run(program) == "import this package as kvcache.backends, not as backends."


# What must not be claimed, and what is no one device's.


GREEDY = """
import numpy
from kvcache.backends._numpy import NumpyBackend

class Modules(NumpyBackend):
    modules = ("builtins",)

class Types(NumpyBackend):
    array_types = (list,)
"""


def test_builtins_belong_to_no_backend(tmp_path):
    """Every object is of a builtin type: whoever claims these takes the arrays of all others."""
    (tmp_path / "greedy.py").write_text(GREEDY)
    distribution(tmp_path, "greedy", "builtins = greedy:Modules")
    program = """
import kvcache, numpy as np
kvcache.register_backend("modules", "greedy:Modules", "greedy", "nothing")
kvcache.register_backend("types", "greedy:Types", "greedy", "nothing")
for call in (
    lambda: kvcache.register_backend("all", "greedy:Modules", "builtins", "nothing"),
    *(lambda name=name: kvcache.get_backend(name) for name in ("builtins", "modules", "types")),
):
    try:
        call()
    except kvcache.UnknownBackendError as error:
        assert "cannot claim the types of builtins" in str(error), error
    else:
        raise AssertionError("not refused")
assert not kvcache.available_backends()["builtins"].installed
from kvcache.backends import backend_type
print(kvcache.backend_of(np.ones(1)).spec, backend_type(np.ones(1)).name)
"""
    assert run(program, tmp_path) == "numpy:cpu numpy"
    with pytest.raises(UnknownBackendError, match="must be arrays of a framework"):
        backend_of([1])


@pytest.mark.parametrize("body", ["raise SystemExit(3)", "1 / 0", "zeros = int"])
def test_a_module_named_as_a_library_may_do_anything(tmp_path, monkeypatch, body):
    name = f"library_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendNotAvailableError, match="to be an installed array-API library"):
        get_backend(f"array_api:{name}")


SHARDED = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
import numpy as np, jax, jax.numpy as jnp, kvcache
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))

def refused(call, words="got an array on cpu:0, cpu:1"):
    try:
        call()
    except kvcache.UnknownBackendError as error:
        assert words in str(error), error
    else:
        raise AssertionError("not refused")

for spec in (P(None, "tp"), P()):  # in parts, and a copy on each
    k = jax.device_put(np.ones((1, 2, 3, 4), np.float32), NamedSharding(mesh, spec))
    refused(lambda: kvcache.backend_of(k))
    assert not any(kvcache.get_backend(f"jax:cpu:{i}").owns(k) for i in range(2))
    for cache in (kvcache.KVCache(), kvcache.RotatingKVCache(8), kvcache.KVCache("jax")):
        asked = cache.backend
        refused(lambda: cache.update(k, k))
        assert (cache.backend, cache.nbytes, cache.dtype) == (asked, 0, None)
        one = jnp.ones((1, 2, 1, 4))
        cache.update(one, one)
        refused(lambda: cache.update(k, k))
        refused(lambda: cache.update(one, k[:, :, :1]))
        assert cache.offset == 1
    pool = kvcache.CausalCache()
    pool.init("jax", capacity=8, max_batch=8)
    pool.start_forward(kvcache.Batch(range(3), [0] * 3))
    refused(lambda: pool.put(k[0], k[0]))
    pool.put(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)))
print("done")
"""


@pytest.mark.one_backend(name="jax")
def test_an_array_on_several_devices_is_refused_and_binds_nothing():
    pytest.importorskip("jax")
    assert run(SHARDED) == "done"


STRICT = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
import numpy as np, jax, kvcache
from kvcache import functional
backend = kvcache.get_backend("jax")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", True)

def run(tracing, dtype):
    def ones(*shape):
        return backend.from_host(np.ones(shape, np.float32), dtype)
    for cache in (kvcache.KVCache(), kvcache.RotatingKVCache(3, 1)):
        for tokens in (2, 1, 2):
            cache.update(ones(1, 2, tokens, 4), ones(1, 2, tokens, 4))
            cache.mask(1, 2)
        cache.checkpoint()
        cache.update(ones(1, 2, 2, 4), ones(1, 2, 2, 4))
        cache.rollback(1)
        state = cache.export_state(2)
        state, keys, _ = tracing(functional.append)(state, ones(1, 2, 1, 4), ones(1, 2, 1, 4))
        mask = tracing(lambda state: functional.mask(state, 1, 2))(state)
        cache.import_state(state)
        assert cache.offset == 7 and keys.dtype.name == dtype, (cache.offset, keys.dtype)
    pool = kvcache.CausalCache(window=4, shift=kvcache.RoPEShift([1.0]))
    pool.init("jax", dtype, capacity=16, max_batch=4, max_sequences=2)
    pool.start_forward(kvcache.Batch(range(4), [0] * 4))
    pool.put(ones(1, 4, 2), ones(1, 4, 2))
    pool.get()
    pool.remove(0, 1, 2)
    plan, state = pool.plan(kvcache.Batch([3], [0])), pool.program_state
    put = tracing(lambda state, plan, k: functional.put(state, plan, 0, k, k))
    state = put(state, plan, ones(1, 1, 2))
    tracing(lambda state, plan: functional.get(state, plan, 0))(state, plan)
    pool.program_state = state
    plans, state = pool.plan_steps(kvcache.Batch([4], [0]), 2), pool.program_state
    k = ones(1, 1, 2)
    state, _ = jax.lax.scan(lambda s, plan: (functional.put(s, plan, 0, k, k), None), state, plans)
    pool.program_state = state
    pool.copy()

for dtype in ("float32", "bfloat16", "float8_e4m3fn"):
    for tracing in (jax.jit, lambda function: function):
        run(tracing, dtype)
print("done")
"""


@pytest.mark.one_backend(name="jax")
def test_strict_promotion_and_64_bit_types():
    pytest.importorskip("jax")
    assert run(STRICT) == "done"
