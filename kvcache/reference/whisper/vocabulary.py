"""The vocabulary of Whisper: the prompt of its decoder, the allowed tokens, and their text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kvcache.backends import HostArray
from kvcache.reference.errors import ModelFileError, UnsupportedModelError
from kvcache.storage.reading import read_regular

try:
    from tokenizers import Tokenizer
except ImportError as missing:
    raise ImportError(
        f"the words of Whisper need {missing.name}; it is not installed. "
        "pip install 'kvcache[audio]'",
        name=missing.name,
    ) from missing

# Models of many languages have one more token in front of it, and need a language in the prompt.
_ENGLISH_START = 50257


class Vocabulary:
    """The tokenizer of a model folder, and the rules for its decoder.

    prompt: the first tokens of every text.
    end: the token that ends a text.
    bias: to be added to logits, float32 [2, size]: 0 where a token may follow and -inf where
        not; row 0 is for the first token of a text, row 1 for later ones.

    Raises: ModelFileError if files are missing or damaged; UnsupportedModelError for a model of
        many languages.
    """

    def __init__(self, folder: Path, size: int) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(read_regular(folder / "tokenizer.json").decode())
            rules = json.loads(read_regular(folder / "config.json"))
            never, first = rules["suppress_ids"], rules["suppress_ids_begin"]
            self.bias = _bias(size, never, first)
        except Exception as error:  # the tokenizer raises nothing more specific
            raise ModelFileError(
                f"a Whisper model needs tokenizer.json and config.json with the tokens to suppress "
                f"beside it; cannot read those in {folder} ({type(error).__name__}: {error}). "
                "Download it again."
            ) from error
        names = ("<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>")
        start, untimed, end = map(self._tokenizer.token_to_id, names)
        if start != _ENGLISH_START or untimed is None or end is None:
            raise UnsupportedModelError(
                f"in an English-only Whisper model {names} are tokens, the first of them "
                f"{_ENGLISH_START}; got {start, untimed, end} in {folder}. "
                "Use tiny.en, base.en, small.en or medium.en."
            )
        self.prompt: tuple[int, ...] = (start, untimed)
        self.end: int = end

    def text(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _bias(size: int, never: list[int], first: list[int]) -> HostArray:
    """Return a bias of -inf for the tokens `never` and, in row 0, for the tokens `first`."""
    bias = np.zeros((2, size), np.float32)
    bias[:, never] = -np.inf
    bias[0, first] = -np.inf
    return bias
