"""Byte-level BPE from the vocabulary inside a GGUF file."""

from __future__ import annotations

# First, because importing it says how to install tokenizers where it is missing.
from kvcache.reference.tokenizer import Tokenizer

# isort: split

from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from kvcache.reference.errors import ModelFileError, UnsupportedModelError

from .gguf import GGUFFile, Metadata

__all__ = ["GGUFTokenizer"]

# Types of tokens in a GGUF file.
_CONTROL, _USER_DEFINED = 3, 4
# Llama 3's rule of splitting words, which the file names but does not hold.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class GGUFTokenizer(Tokenizer):
    """Text to token ids and back, as the model in a GGUF file was trained."""

    def __init__(self, metadata: Metadata) -> None:
        """Build a tokenizer from the metadata of an open GGUF file.

        Raises: UnsupportedModelError for another algorithm than byte-level BPE, or for rules
            of splitting words that are not known here; ModelFileError without a vocabulary.
        """
        vocabulary = _Vocabulary(metadata)
        adds_bos = vocabulary.get("add_bos_token", vocabulary.pre == "llama-bpe")
        template = metadata.get("tokenizer.chat_template")
        try:
            algorithm = vocabulary.build()
        except ModelFileError:
            raise
        except Exception as error:  # the library raises nothing more specific
            raise ModelFileError(
                f"the vocabulary of the model file makes no sense ({error}). Download it again."
            ) from error
        super().__init__(
            algorithm,
            bos_id=vocabulary.token_id("bos") if adds_bos else None,
            eos_id=vocabulary.token_id("eos"),
            template=template if isinstance(template, str) else None,
            names={f"{role}_token": vocabulary.name(role) for role in ("bos", "eos")},
        )

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> GGUFTokenizer:
        """Build the tokenizer of an open model file. Raises as the constructor does."""
        return cls(file.metadata)


class _Vocabulary:
    """The ``tokenizer.ggml.*`` keys of a file's metadata."""

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        if self.get("model") != "gpt2":
            raise UnsupportedModelError(
                "the reference tokenizer does byte-level BPE (tokenizer.ggml.model 'gpt2'); "
                f"got {self.get('model')!r}. Use another GGUF file, for example of SmolLM2."
            )
        self.pre = str(self.get("pre"))
        self.splitter = _splitter(self.pre)

    def get(self, key: str, default: object = None) -> object:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def token_id(self, role: str) -> int | None:
        """Return the token of a role, ``"bos"`` or ``"eos"``, if the file names one."""
        token_id = self.get(f"{role}_token_id")
        if not isinstance(token_id, int):
            return None
        if not 0 <= token_id < len(self._list("tokens")):
            raise ModelFileError(
                f"tokens are numbered from 0 to {len(self._list('tokens')) - 1}; the model file "
                f"has {token_id} for {role}. Download it again."
            )
        return token_id

    def name(self, role: str) -> str:
        token_id = self.token_id(role)
        return "" if token_id is None else str(self._list("tokens")[token_id])

    def build(self) -> tokenizers.Tokenizer:
        """Return the algorithm with this vocabulary, its rules and its added tokens."""
        ids = {token: i for i, token in enumerate(self._list("tokens"))}
        merges = [
            (left, right) for left, _, right in (m.partition(" ") for m in self._list("merges"))
        ]
        # Llama 3 takes a word that is in the vocabulary whole, whatever the merges say.
        model = models.BPE(ids, merges, ignore_merges=self.pre == "llama-bpe")
        bpe = tokenizers.Tokenizer(model)
        bpe.pre_tokenizer = self.splitter
        bpe.decoder = decoders.ByteLevel()
        bpe.add_tokens(self._added(_USER_DEFINED))
        bpe.add_special_tokens(self._added(_CONTROL))
        return bpe

    def _added(self, kind: int) -> list[AddedToken]:
        kinds = self.get("token_type")
        if not isinstance(kinds, list):  # the key is optional: then all tokens are ordinary ones
            return []
        pairs = zip(self._list("tokens"), kinds, strict=False)
        special = kind == _CONTROL
        return [AddedToken(t, normalized=False, special=special) for t, k in pairs if k == kind]

    def _list(self, key: str) -> Sequence[str]:
        """Return a list of strings of the vocabulary. Raise ModelFileError without one."""
        strings = self.get(key)
        if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
            raise ModelFileError(
                f"the model file has no vocabulary: tokenizer.ggml.{key} is missing, or no texts."
            )
        return strings


def _splitter(pre: str) -> pre_tokenizers.PreTokenizer:
    """Return the rule called `pre` for cutting text into words, before byte pairs are merged."""
    match pre:
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            return pre_tokenizers.Sequence([digits, _byte_level(words=True)])
        case "gpt-2" | "gpt2":
            return _byte_level(words=True)
        case "llama-bpe":
            words = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated")
            return pre_tokenizers.Sequence([words, _byte_level(words=False)])
    raise UnsupportedModelError(
        "the reference tokenizer splits words as 'gpt-2', 'llama-bpe' and 'smollm' do "
        f"(tokenizer.ggml.pre); got {pre!r}. Use another GGUF file, for example of SmolLM2."
    )


def _byte_level(words: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
