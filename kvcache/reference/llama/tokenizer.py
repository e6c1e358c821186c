"""Byte-level BPE from the vocabulary inside a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvcache.reference.errors import ModelFileError, UnsupportedModelError
from kvcache.reference.template import render_template

from .gguf import GGUFFile, Metadata

try:
    import jinja2  # noqa: F401 - for chat templates, in a process of their own
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
except ImportError as error:
    raise ImportError(
        f"tokenizing needs {error.name}. pip install 'kvcache[demo]'", name=error.name
    ) from error

__all__ = ["TextStream", "Tokenizer"]

# Types of tokens in a GGUF file.
_CONTROL, _USER_DEFINED = 3, 4
# Llama 3's rule of splitting words, which the file names but does not hold.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to token ids and back, as the model in a GGUF file was trained.

    bos_id: token to put in front of every prompt, or None.
    eos_id: token that ends an answer, or None.
    """

    def __init__(self, metadata: Metadata) -> None:
        """Build a tokenizer from the metadata of an open GGUF file.

        Raises: UnsupportedModelError for another algorithm than byte-level BPE, or for rules
            of splitting words that are not known here; ModelFileError without a vocabulary.
        """
        vocabulary = _Vocabulary(metadata)
        self.eos_id = vocabulary.token_id("eos")
        adds_bos = vocabulary.get("add_bos_token", vocabulary.pre == "llama-bpe")
        self.bos_id = vocabulary.token_id("bos") if adds_bos else None
        template = metadata.get("tokenizer.chat_template")
        self._template = template if isinstance(template, str) else None
        self._names = {f"{role}_token": vocabulary.name(role) for role in ("bos", "eos")}
        try:
            self._bpe = vocabulary.build()
        except ModelFileError:
            raise
        except Exception as error:  # the library raises nothing more specific
            raise ModelFileError(
                f"the vocabulary of the model file makes no sense ({error}). Download it again."
            ) from error

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """Build the tokenizer of an open model file. Raises as the constructor does."""
        return cls(file.metadata)

    def encode(self, text: str, special: bool = False, bos: bool = False) -> list[int]:
        """Return the token ids of `text`.

        special: read ``<|im_start|>`` and its like as the tokens they name; otherwise they
            are ordinary characters, so that a user's text cannot pose as a turn of its own.
        bos: put the beginning-of-text token in front, if the file wants one.
        """
        self._bpe.encode_special_tokens = not special
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special tokens included; incomplete UTF-8 becomes U+FFFD."""
        return str(self._bpe.decode(list(ids), skip_special_tokens=False))

    def stream(self) -> TextStream:
        """Return a decoder for tokens coming one at a time."""
        return TextStream(self._bpe)

    def apply_chat(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Return token ids of a conversation in the file's own chat template, up to the answer.

        messages: ``[{"role": "user", "content": "..."}, ...]``, or the text of one user turn.

        Raises: UnsupportedModelError if the file has no template, or one that cannot be used.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.encode(self.render_chat(messages), special=True)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of a conversation in the file's own chat template, up to the answer.

        Raises: as :meth:`apply_chat`.
        """
        if self._template is None:
            raise UnsupportedModelError(
                "a chat needs a GGUF file with tokenizer.chat_template; this one has none. "
                "Use plain completion, or an instruction-tuned model."
            )
        variables = {"messages": list(messages), "add_generation_prompt": True, **self._names}
        return render_template(self._template, variables)


class TextStream:
    """Text of tokens as they come; bytes of an incomplete character are held back."""

    def __init__(self, bpe: tokenizers.Tokenizer) -> None:
        self._bpe = bpe
        self._stream = decoders.DecodeStream(skip_special_tokens=False)

    def push(self, token_id: int) -> str:
        """Return the text completed by `token_id`, possibly ``""``."""
        return self._stream.step(self._bpe, token_id) or ""


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
