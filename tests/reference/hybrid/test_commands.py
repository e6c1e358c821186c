"""`kvcache chat` and `kvcache generate` with a checkpoint directory."""

import re

import pytest

pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")

from typer.testing import CliRunner

from kvcache.cli import app
from kvcache.errors import ForeignFileError, StoreError
from kvcache.reference.errors import ModelFileError, UnsupportedModelError

# Of 8 tokens to compute each: where every length is compiled by itself, there is one.
TURNS = "Hello\nAnd\nSo?\n"


def run(command, path, *arguments, **options):
    arguments = [command, "--model", str(path), *arguments]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "300"}, **options)


def chatted(path, backend, cache, count=5):
    """The answers of `kvcache chat`, of `count` tokens, and the tokens reused in each turn."""
    options = ["--backend", backend, "--cache", cache, "-n", str(count), "--no-compare"]
    result = run("chat", path, *options, input=TURNS)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if "tokens reused, first token" in line]
    return result.stdout, [line.partition(" tokens")[0] for line in lines]


@pytest.fixture(scope="session")
def expected(chat_path):
    return chatted(chat_path, "numpy", "kv")


def test_chat_reuses_earlier_turns(expected):
    text, reused = expected
    assert len(text.encode()) > 15
    # "Hello" between the tokens of its turn and of the answer, of which the last was not fed.
    assert reused == ["0 of 8", "12 of 20", "24 of 32"]


@pytest.mark.parametrize("cache", ["kv", "pool"])
def test_chat_says_the_same_on_every_backend(backend, chat_path, expected, cache):
    assert chatted(chat_path, backend.name, cache) == expected


@pytest.fixture(scope="session")
def trained_path(tmp_path_factory):
    """The directory of a hybrid as the training script leaves it, after a few small steps."""
    pytest.importorskip("torch", reason="needs pip install 'kvcache[torch]'")
    from kvcache.reference.hybrid import train as training

    path = tmp_path_factory.mktemp("trained") / "small"
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {"BATCH": 2, "LENGTH": 64, "WARMUP": 4}.items():
            patched.setattr(training, name, value)
        training.main([str(path), "--steps", "40"])
    return path


@pytest.fixture(scope="session")
def expected_of_trained(trained_path):
    return chatted(trained_path, "numpy", "kv", 24)


@pytest.mark.slow
@pytest.mark.cross_backend  # trained by torch, and compared with NumPy
@pytest.mark.parametrize("cache", ["kv", "pool"])
def test_a_trained_model_says_the_same_on_every_backend(
    backend, trained_path, expected_of_trained, cache
):
    """The answers are long enough to tell what came before: they differ from turn to turn."""
    text, reused = expected_of_trained
    assert text.isascii(), "bytes at random are no text"
    assert len(set(text.splitlines())) == 3
    assert reused == ["0 of 8", "31 of 39", "62 of 70"]
    assert chatted(trained_path, backend.name, cache, 24) == expected_of_trained


def test_chat_with_a_ring(chat_path):
    assert chatted(chat_path, "numpy", "rotating")[1] == ["0 of 8", "12 of 20", "24 of 32"]


@pytest.mark.parametrize("cache", ["kv", "rotating", "none", "pool"])
def test_generate(chat_path, cache):
    result = run("generate", chat_path, "--cache", cache, "-n", "6", "Once")
    assert result.exit_code == 0, result.output
    [text] = {result.stdout.removeprefix("[1] ")}
    kv = run("generate", chat_path, "-n", "6", "Once")
    assert text == kv.stdout
    assert "kv, float32" in kv.stderr
    assert "for 9 tokens, 0 growths" in kv.stderr


def test_generate_many(chat_path):
    result = run("generate", chat_path, "-n", "6", "Once", "-p", "Twice", "--max-sequences", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("[1] ")
    assert "Prompt 2 waits" in result.stderr
    assert "tokens/s" in result.stderr


def test_generate_with_the_template(chat_path):
    result = run("generate", chat_path, "-n", "6", "--chat", "Hello")
    assert result.exit_code == 0, result.output
    assert "8 tokens" in result.stderr


@pytest.mark.cross_backend
def test_relay(chat_path):
    relayed = run("generate", chat_path, "-n", "6", "--relay", "numpy,torch", "Once")
    assert relayed.exit_code == 0, relayed.output
    assert relayed.stdout == run("generate", chat_path, "-n", "6", "Once").stdout
    assert "[4 caches of 7 tokens handed to torch" in relayed.stderr


def test_what_cannot_be(chat_path, tmp_path):
    result = run("generate", chat_path, "--cache", "pool", "--context-shift", "Once")
    assert isinstance(result.exception, UnsupportedModelError)
    assert "a state cannot forget them" in str(result.exception)
    result = run("chat", tmp_path)
    assert isinstance(result.exception, ModelFileError)
    assert "config.json" in str(result.exception)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = run("chat", tmp_path)
    assert "whose model_type is 'qwen3_next'; got 'llama'" in str(result.exception)


# After a restart.

ANSWERED = r"(\d+) of (\d+) tokens reused"
FETCHED = r"(\d+) tokens came from the store, (\d+) pages went there"


def numbers(pattern, text):
    return [tuple(map(int, numbers)) for numbers in re.findall(pattern, text)]


def chatted_on(path, folder, backend, text, cache="kv", *options):
    """One run of `kvcache chat` on a store and a history; its answers, and what its lines count."""
    tiers = ["--store", f"file://{folder}/store", "--history", str(folder / "chat.json")]
    given = ["--backend", backend, "--cache", cache, "-n", "5", "--no-compare", *tiers, *options]
    result = run("chat", path, *given, input=text)
    assert result.exit_code == 0, result.output
    [stored] = numbers(FETCHED, result.stderr)
    return result.stdout, numbers(ANSWERED, result.stderr), stored


@pytest.fixture(scope="session")
def whole(chat_path, tmp_path_factory):
    """The answers of one run, for all turns."""
    folder = tmp_path_factory.mktemp("whole")
    text, reused, stored = chatted_on(chat_path, folder, "numpy", TURNS)
    assert reused == [(0, 8), (12, 20), (24, 32)]
    assert stored[0] == 0
    return text


@pytest.mark.parametrize("cache", ["kv", "pool", "rotating"])
@pytest.mark.parametrize(
    "names", [("numpy",) * 3, pytest.param(("torch", "jax", "mlx"), marks=pytest.mark.matrix)]
)
def test_a_conversation_goes_on_after_a_restart(chat_path, whole, tmp_path, cache, names):
    answers = ""
    for name, turn, reused in zip(names, TURNS.splitlines(), [0, 12, 24], strict=True):
        pytest.importorskip(name)
        text, counts, stored = chatted_on(chat_path, tmp_path, name, f"{turn}\n", cache)
        # All of the turns before but the token that was sampled last, which nobody computed.
        assert counts == [(reused, reused + 8)]
        assert stored[0] == reused
        assert stored[1] > 0
        answers += text
    assert answers == whole


@pytest.mark.cross_backend
def test_a_conversation_goes_on_elsewhere(chat_path, whole, tmp_path):
    first = chatted_on(chat_path, tmp_path, "torch", "Hello\nAnd\n")
    last = chatted_on(chat_path, tmp_path, "numpy", "So?\n")
    assert last[1:2] == ([(24, 32)],)
    assert first[0] + last[0] == whole


def test_the_same_turns_again_are_found_without_a_history(chat_path, tmp_path):
    store = f"file://{tmp_path}"
    options = ["-n", "5", "--no-compare", "--store", store]
    first, again = (run("chat", chat_path, *options, input=TURNS) for _ in range(2))
    assert again.stdout == first.stdout
    assert numbers(ANSWERED, again.stderr) == [(7, 8), (19, 20), (31, 32)]


def test_a_history_is_of_its_model(chat_path, tmp_path):
    chatted_on(chat_path, tmp_path, "numpy", "Hello\n")
    history = tmp_path / "chat.json"
    options = ["--history", str(history), "-n", "5"]
    result = run("chat", chat_path, *options, "--system", "Be short.", input="And\n")
    assert result.exit_code != 0
    assert "--system begins a conversation" in result.output
    history.write_text(history.read_text().replace('"model": "', '"model": "0'))
    result = run("chat", chat_path, *options, input="And\n")
    assert "goes on with the model that it began with" in str(result.exception)
    history.write_text("{}")
    result = run("chat", chat_path, *options, input="And\n")
    assert isinstance(result.exception, ForeignFileError)


def test_a_store_that_is_gone_costs_a_chat_nothing(chat_path, tmp_path, expected):
    (tmp_path / "file").write_text("no directory")
    options = ["-n", "5", "--no-compare", "--store", f"file://{tmp_path}/file"]
    result = run("chat", chat_path, *options, input=TURNS)
    assert (result.exit_code, result.stdout) == (0, expected[0])
    [(fetched, written)] = numbers(FETCHED, result.stderr)
    assert fetched == written == 0
    assert "were lost" in result.stderr


def test_a_store_is_refused_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("kvcache.cli.chat.load_model", lambda *_: pytest.fail("it was loaded"))
    result = run("chat", "nowhere", "--store", "somewhere")
    assert isinstance(result.exception, StoreError)
