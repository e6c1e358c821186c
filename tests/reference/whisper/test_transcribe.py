"""Transcription against a slow model that shares no code; real speech on every backend."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

import kvcache
from kvcache.errors import ShapeError
from kvcache.reference.errors import ModelFileError
from kvcache.reference.whisper.mel import RATE
from kvcache.reference.whisper.model import default_model_folder, load_whisper
from kvcache.reference.whisper.transcribe import transcribe

from .oracle import POSITIONS, joined, steps


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


# The command line.


def test_command_line(tmp_path, tiny_folder, noises, expected):
    pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")
    soundfile = pytest.importorskip("soundfile", reason="needs pip install 'kvcache[audio]'")
    from typer.testing import CliRunner

    from kvcache.cli import app

    def command(*arguments):
        result = CliRunner().invoke(app, ["transcribe", *map(str, arguments)])
        return result.exit_code, result.stdout, " ".join(result.stderr.split())

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
