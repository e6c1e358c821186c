"""Tokenizers of checkpoint directories: end tokens, templates, and damaged files."""

import json

import pytest

pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

from kvcache.reference.errors import ModelFileError, UnsupportedModelError
from kvcache.reference.hybrid.checkpoint import Checkpoint
from kvcache.reference.hybrid.corpus import SPECIAL
from kvcache.reference.hybrid.saving import byte_tokenizer
from kvcache.reference.hybrid.tokenizer import read_tokenizer

HARD = "naïve 🙂\r\n\t</s>"


@pytest.fixture
def tokenizer_of(write_checkpoint):
    """Reads the tokenizer of a directory with some files."""

    def read(settings=(), **files):
        path = write_checkpoint({"vocab_size": 260} | dict(settings))
        files = {"tokenizer_json": byte_tokenizer(SPECIAL).to_str()} | files
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (path / name.replace("_json", ".json").replace("_jinja", ".jinja")).write_text(text)
        return read_tokenizer(Checkpoint(path))

    return read


def test_round_trip(tokenizer_of):
    tokenizer = tokenizer_of()
    ids = tokenizer.encode(HARD)
    assert len(ids) == len(HARD.encode())
    assert tokenizer.decode(ids) == HARD
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) == HARD


def test_special_tokens_only_when_asked(tokenizer_of):
    tokenizer = tokenizer_of()
    assert tokenizer.encode("<|user|>a", special=True) == [257, tokenizer.encode("a")[0]]
    assert len(tokenizer.encode("<|user|>a")) == 9


@pytest.mark.parametrize(
    ("settings", "files", "expected"),
    [
        ({"eos_token_id": 5}, {}, 5),
        ({"eos_token_id": 5}, {"generation_config_json": {"eos_token_id": [7, 8]}}, 7),
        ({"eos_token_id": 5}, {"generation_config_json": {}}, 5),
        ({"eos_token_id": 999}, {}, None),
        ({}, {"tokenizer_config_json": {"eos_token": "<|end|>"}}, 259),
        ({}, {"tokenizer_config_json": {"eos_token": {"content": "<|end|>"}}}, 259),
        ({}, {"tokenizer_config_json": {"eos_token": 3}}, None),
        ({}, {}, None),
    ],
    ids=str,
)
def test_end_token(tokenizer_of, settings, files, expected):
    assert tokenizer_of(settings, **files).eos_id == expected


def test_beginning_of_text(tokenizer_of):
    settings = {"bos_token": "<|system|>", "add_bos_token": True}
    assert tokenizer_of(tokenizer_config_json=settings).encode("", bos=True) == [256]
    settings["add_bos_token"] = False
    assert tokenizer_of(tokenizer_config_json=settings).encode("", bos=True) == []


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template_jinja": "{{ eos_token }}!", "tokenizer_config_json": {"eos_token": "E"}},
        {"tokenizer_config_json": {"eos_token": "E", "chat_template": "{{ eos_token }}!"}},
        {
            "tokenizer_config_json": {
                "eos_token": "E",
                "chat_template": [
                    {"name": "tools", "template": "no"},
                    {"name": "default", "template": "{{ eos_token }}!"},
                ],
            }
        },
    ],
    ids=["file", "text", "list"],
)
def test_templates(tokenizer_of, files):
    tokenizer = tokenizer_of(**files)
    assert tokenizer.decode(tokenizer.apply_chat("a")) == "E!"


def test_no_template(tokenizer_of):
    with pytest.raises(UnsupportedModelError, match="a chat template; this one has none"):
        tokenizer_of().apply_chat("a")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": 5}', "\x00", "null"])
def test_damaged(tokenizer_of, text):
    with pytest.raises(ModelFileError, match=r"tokenizer.json"):
        tokenizer_of(tokenizer_json=text)


def test_more_tokens_than_the_model(tokenizer_of):
    with pytest.raises(ModelFileError, match=r"it has 260 tokens, the model 259"):
        tokenizer_of({"vocab_size": 259})


def test_missing(write_checkpoint):
    with pytest.raises(ModelFileError, match=r"tokenizer.json"):
        read_tokenizer(Checkpoint(write_checkpoint()))
