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
pytestmark = pytest.mark.one_backend(name="jax")

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
    return kept | variables


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Runs the tests on eight devices; the programs compiled meanwhile, by their file."""
    folder = tmp_path_factory.mktemp("programs")
    flags = [
        "--xla_force_host_platform_device_count=8",
        f"--xla_dump_to={folder}",
        "--xla_dump_hlo_as_text",
        f"--xla_dump_hlo_module_re=^jit__?({'|'.join(KINDS)})",
    ]
    tests = Path(__file__).with_name("on_eight_devices.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        env=environment(XLA_FLAGS=" ".join(flags)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: path.read_text() for path in folder.glob("*after_optimizations.txt")}


def those_of_the_backend(programs, *kinds):
    pattern = rf"jit__?({'|'.join(kinds)})\."
    return {name: text for name, text in programs.items() if re.search(pattern, name)}


def test_no_program_of_the_backend_has_a_collective(programs):
    own = those_of_the_backend(programs, *KINDS)
    assert len(own) > 20
    texts = {name: FINITE.sub("", text) for name, text in own.items()}
    assert {name for name, text in texts.items() if COLLECTIVES.search(text)} == set()


def test_no_write_copies_its_buffer(programs):
    writes = those_of_the_backend(programs, *WRITES)
    assert len(writes) > 10
    for name, text in writes.items():
        # Buffers, as many updates, and the place to write them to.
        sizes = [
            elements(shape) for shape in re.findall(r"\w\[([\d,]*)\]", ARGUMENTS.search(text)[1])
        ]
        buffer, update = sizes[0], sizes[len(sizes) // 2]
        if update < buffer:  # a whole pool is copied at once
            assert copies(text, buffer) == [], name
