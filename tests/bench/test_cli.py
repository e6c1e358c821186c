"""The commands: options reach the benchmark, and what it finds reaches the screen and a file."""

import pytest

import kvcache.bench
from kvcache.bench import (
    AppendReport,
    DiffusionReport,
    Load,
    PlanReport,
    StateReport,
    StepReport,
    StoreReport,
)
from kvcache.reference.dit.model import DiT, DiTConfig

pytest.importorskip("typer")
testing = pytest.importorskip("typer.testing")

TINY_STEP = "--backends numpy --dtypes float32 --layers 2 --heads 2 --head-dim 4 --rounds 2"


def invoke(arguments, *more):
    from kvcache.cli import app

    return testing.CliRunner().invoke(app, ["bench", *arguments.split(), *more])


@pytest.fixture
def small_loads(monkeypatch):
    monkeypatch.setattr(
        kvcache.bench.run_plan, "__defaults__", ((Load(2, 16, 12),), 1024, 101, None)
    )


def test_append(tmp_path):
    path = tmp_path / "append.json"
    options = "--backends numpy --dtypes float32 --capacities 8,16 --heads 1 --rounds 2"
    result = invoke(f"append {options} --json", str(path))
    assert result.exit_code == 0, result.output
    assert "us to append one token" in result.stdout
    report = AppendReport.from_json(path)
    assert (report.capacities, report.heads, report.rounds) == ([8, 16], 1, 2)
    assert report.groups == [("numpy:cpu", "float32")]


@pytest.mark.usefixtures("small_loads")
def test_plan(tmp_path):
    path = tmp_path / "plan.json"
    result = invoke("plan --window 4 --rounds 2 --json", str(path))
    assert result.exit_code == 0, result.output
    assert "2 x 16 cells, 12 used" in result.stdout
    assert "window 4" in result.stdout
    report = PlanReport.from_json(path)
    assert (report.rounds, len(report.timings)) == (2, 8)


@pytest.mark.usefixtures("small_loads")
def test_a_window_that_drops_nothing_is_refused():
    result = invoke("plan --window 12 --rounds 2")
    assert isinstance(result.exception, ValueError)
    assert "shorter than what is used" in str(result.exception)


def test_step(tmp_path):
    path = tmp_path / "step.json"
    result = invoke(f"step --batches 1,2 --tokens 16 {TINY_STEP} --json", str(path))
    assert result.exit_code == 0, result.output
    assert "2 layers of 2 heads x 4" in result.stdout
    assert "CausalCache" in result.stdout
    report = StepReport.from_json(path)
    assert report.places == [(1, 16), (2, 8)]
    assert (report.layers, report.heads, report.head_dim, report.rounds) == (2, 2, 4, 2)


def test_state(tmp_path):
    path = tmp_path / "state.json"
    tiny = "--layers 2 --heads 2 --head-dim 4 --channels 6 --kernel 3 --rounds 2"
    result = invoke(f"state --backends numpy --batches 1,2 {tiny} --json", str(path))
    assert result.exit_code == 0, result.output
    assert "2 layers with states of 2 x 4 x 4 and 6 x 2" in " ".join(result.stdout.split())
    report = StateReport.from_json(path)
    assert report.places == [1, 2]
    assert (report.channels, report.kernel, report.rounds) == (6, 3, 2)


def test_store(tmp_path):
    path = tmp_path / "store.json"
    result = invoke("store --sizes 1k,100 --rounds 2 --json", str(path))
    assert result.exit_code == 0, result.output
    assert "Values into and out of stores" in result.stdout
    report = StoreReport.from_json(path)
    assert (report.sizes, report.rounds) == ([100, 1024], 2)


def test_diffusion(tmp_path):
    model = tmp_path / "model.safetensors"
    tiny = DiTConfig(tokens=8, width=8, heads=2, blocks=3)
    DiT.random(tiny, kvcache.get_backend("numpy")).save(model)
    small = "--backends numpy --steps 6 --samples 1 --rounds 1 --no-peers"
    result = invoke(f"diffusion {small} --model", str(model), "--json", str(tmp_path / "it.json"))
    assert result.exit_code == 0, result.output
    assert "TeaCache" in result.stdout
    assert DiffusionReport.from_json(tmp_path / "it.json").places == ["numpy"]


def test_diffusion_without_torch_wants_a_model(monkeypatch):
    monkeypatch.setattr("kvcache.cli.bench.find_spec", lambda name: None)
    result = invoke("diffusion --backends numpy")
    assert result.exit_code == 2
    assert "training the model needs torch" in " ".join(result.output.split())


def test_without_backends_all_installed_are_measured(monkeypatch):
    monkeypatch.setattr("kvcache.cli.bench.installed_backends", lambda: ["numpy"])
    result = invoke("step --dtypes float32 --batches 1 --tokens 8 --layers 1 --rounds 1")
    assert result.exit_code == 0, result.output
    assert "numpy:cpu float32" in result.stdout


@pytest.mark.parametrize("command", ["append", "diffusion", "plan", "state", "step", "store"])
def test_help_teaches_by_an_example(command):
    result = invoke(f"{command} --help")
    assert result.exit_code == 0
    assert f"kvcache bench {command} --" in result.stdout
    for option in ("--rounds", "--json"):
        assert option in result.stdout


def test_a_plot_without_matplotlib_is_refused_before_measuring(monkeypatch):
    monkeypatch.setattr("kvcache.cli.bench.find_spec", lambda name: None)
    result = invoke("append --plot append.png")
    assert result.exit_code == 2
    assert "matplotlib" in result.output
