"""Sharding on JAX, on eight devices that XLA makes of one CPU.

How many there are is settled before JAX starts. So the tests themselves are in
`on_eight_devices.py`, and run in a process of their own; the programs that are compiled there are
looked at here.
"""

import os
import re
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="needs pip install 'kvcache[jax]'")
pytestmark = [pytest.mark.one_backend(name="jax"), pytest.mark.slow]

COLLECTIVES = re.compile(r" ((?:all-|collective-|reduce-scatter)[\w-]*)\(")
WRITES = "write_rows", "write_row_sets", "write_slices?"
KINDS = "cast_all", "join", "read_rows", "read_slice", "replace", *WRITES
"""Names of the programs of the backend."""
COPY = re.compile(r"= \w+\[([\d,]*)\]\S* copy\(")
ARGUMENTS = re.compile(r"entry_computation_layout=\{\((.*?)\)->")
# Whether all numbers of a token are finite, of keys and values in different layouts.
FINITE = re.compile(r"= \(?pred\[\d+\][^=]* all-reduce\(.*")


def copies(text, size):
    """Shapes of the copies in the text of a program, as far as they have `size` elements."""
    return [shape for shape in COPY.findall(text) if elements(shape) >= size]


def elements(shape):
    """The number of elements of a shape in the text of a program: "4,8,16"."""
    return prod(map(int, filter(None, shape.split(","))))


def environment(**variables):
    """Without what would keep programs from being compiled here, and in full."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    return kept | variables | {"JAX_PLATFORMS": "cpu"}


def run_on_eight_devices(folder):
    """Runs the tests there, and returns the programs compiled meanwhile, by their file."""
    flags = [
        "--xla_force_host_platform_device_count=8",
        # Machine code of little programs, of which each runs once: not what is looked at here.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        f"--xla_dump_to={folder}",
        "--xla_dump_hlo_as_text",
        f"--xla_dump_hlo_module_re=^jit__?({'|'.join(KINDS)})",
    ]
    tests = Path(__file__).with_name("on_eight_devices.py")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        env=environment(XLA_FLAGS=" ".join(flags)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: path.read_text() for path in folder.glob("*after_optimizations.txt")}


def test_on_eight_devices(tmp_path):
    """They pass; and no program of the backend had a collective, nor copied the buffer it wrote."""
    programs = run_on_eight_devices(tmp_path)
    check_collectives(programs)
    check_copies(programs)


def those_of_the_backend(programs, *kinds):
    pattern = rf"jit__?({'|'.join(kinds)})\."
    return {name: text for name, text in programs.items() if re.search(pattern, name)}


def check_collectives(programs):
    own = those_of_the_backend(programs, *KINDS)
    assert len(own) > 20
    texts = {name: FINITE.sub("", text) for name, text in own.items()}
    assert {name for name, text in texts.items() if COLLECTIVES.search(text)} == set()


def check_copies(programs):
    writes = those_of_the_backend(programs, *WRITES)
    assert len(writes) > 10
    for name, text in writes.items():
        # Buffers, as many updates, and the place to write them to.
        shapes = re.findall(r"\w\[([\d,]*)\]", ARGUMENTS.search(text)[1])
        buffer, update = elements(shapes[0]), elements(shapes[len(shapes) // 2])
        if update < buffer:  # a whole pool is copied at once
            assert copies(text, buffer) == [], name
