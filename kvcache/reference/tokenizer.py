"""Text to token ids and back, and conversations in the template of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .errors import UnsupportedModelError
from .template import render_template

try:
    import jinja2  # noqa: F401 - for chat templates, in a process of their own
    import tokenizers
    from tokenizers import decoders
except ImportError as error:
    raise ImportError(
        f"tokenizing needs {error.name}. pip install 'kvcache[demo]'", name=error.name
    ) from error

__all__ = ["TextStream", "Tokenizer"]


class Tokenizer:
    """Text to token ids and back, as a model was trained.

    algorithm: of the library tokenizers; it is used without a copy.
    bos_id: token to put in front of every prompt, or None.
    eos_id: token that ends an answer, or None.
    template: chat template of the model, if it has one.
    names: of special tokens, by the variables of the template: ``bos_token``, ``eos_token``.
    """

    def __init__(
        self,
        algorithm: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        template: str | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.bos_id, self.eos_id = bos_id, eos_id
        self._algorithm, self._template, self._names = algorithm, template, dict(names or {})

    def encode(self, text: str, special: bool = False, bos: bool = False) -> list[int]:
        """Return the token ids of `text`.

        special: read ``<|im_start|>`` and its like as the tokens they name; otherwise they
            are ordinary characters, so that a user's text cannot pose as a turn of its own.
        bos: put the beginning-of-text token in front, if the model wants one.
        """
        self._algorithm.encode_special_tokens = not special
        ids: list[int] = self._algorithm.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special tokens included; incomplete UTF-8 becomes U+FFFD."""
        return str(self._algorithm.decode(list(ids), skip_special_tokens=False))

    def stream(self) -> TextStream:
        """Return a decoder for tokens coming one at a time."""
        return TextStream(self._algorithm)

    def apply_chat(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Return token ids of a conversation in the model's own chat template, up to the answer.

        messages: ``[{"role": "user", "content": "..."}, ...]``, or the text of one user turn.

        Raises: UnsupportedModelError if the model has no template, or one that cannot be used.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.encode(self.render_chat(messages), special=True)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of a conversation in the model's own chat template, up to the answer.

        Raises: as :meth:`apply_chat`.
        """
        if self._template is None:
            raise UnsupportedModelError(
                "a chat needs a model with a chat template; this one has none. "
                "Use plain completion, or an instruction-tuned model."
            )
        variables = {"messages": list(messages), "add_generation_prompt": True, **self._names}
        return render_template(self._template, variables)


class TextStream:
    """Text of tokens as they come; bytes of an incomplete character are held back."""

    def __init__(self, algorithm: tokenizers.Tokenizer) -> None:
        self._algorithm = algorithm
        self._stream = decoders.DecodeStream(skip_special_tokens=False)

    def push(self, token_id: int) -> str:
        """Return the text completed by `token_id`, possibly ``""``."""
        return self._stream.step(self._algorithm, token_id) or ""
