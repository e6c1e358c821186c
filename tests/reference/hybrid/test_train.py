"""A short training: it learns, is the same for the same seed, and gives a model to talk to."""

import pytest

pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("torch", reason="needs pip install 'kvcache[torch]'")

import kvcache
from kvcache.reference.hybrid import train as training
from kvcache.reference.hybrid.checkpoint import Checkpoint
from kvcache.reference.hybrid.tokenizer import read_tokenizer

from .conftest import load

pytestmark = pytest.mark.one_backend(name="torch")


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    monkeypatch.setattr(training, "BATCH", 2)
    monkeypatch.setattr(training, "LENGTH", 48)
    monkeypatch.setattr(training, "WARMUP", 1)


def losses(steps, seed):
    told = []
    training.train(steps=steps, seed=seed, progress=lambda *report: told.append(report))
    assert [report[:2] for report in told] == [(done, steps) for done in range(1, steps + 1)]
    return [report[2] for report in told]


@pytest.mark.slow
def test_it_learns():
    told = losses(12, seed=0)
    assert told[0] > 4.5  # of 260 tokens: log(260) is 5.6
    assert told[-1] < 0.8 * told[0]


def test_a_seed_gives_the_same_again():
    assert losses(2, seed=1) == losses(2, seed=1) != losses(2, seed=2)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    training.main([str(tmp_path / "small"), "--steps", "1"])
    said = capsys.readouterr().err
    assert "step 1 of 1, " in said
    assert "you> len" in said
    assert f"kvcache chat --model {tmp_path / 'small'}" in said
    file = Checkpoint(tmp_path / "small")
    tokenizer, model = read_tokenizer(file), load(file.path, kvcache.get_backend("torch"))
    logits = model([tokenizer.apply_chat("len")], model.make_caches())
    assert logits.shape == (1, 260)


def test_no_steps():
    with pytest.raises(ValueError, match="1 step or more; got 0"):
        training.train(steps=0)


def test_bad_arguments(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, says in (
        ([str(tmp_path), "--steps", "0"], "1 step or more; got 0"),
        ([str(tmp_path / "file")], "exists"),
    ):
        with pytest.raises(SystemExit):
            training.main(arguments)
        assert says in capsys.readouterr().err
