"""The tokenizer of a checkpoint directory, with the chat template and end token beside it."""

from __future__ import annotations

# First, because importing it says how to install tokenizers where it is missing.
from kvcache.reference.tokenizer import Tokenizer

# isort: split

from collections.abc import Mapping

import tokenizers

from kvcache.reference.errors import ModelFileError

from .checkpoint import Checkpoint

__all__ = ["read_tokenizer"]

_GENERATION, _TOKENIZER = "generation_config.json", "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"


def read_tokenizer(file: Checkpoint) -> Tokenizer:
    """Return the tokenizer in ``tokenizer.json``.

    The token that ends an answer is that of ``generation_config.json`` or else ``config.json``, the
    first one if there are several. Chat template and other special tokens are those of
    ``tokenizer_config.json``, or the template that of a file of its own.

    Raises: ModelFileError if a file is missing or damaged.
    """
    text = file.text("tokenizer.json")
    try:
        algorithm = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise _damaged(file, "tokenizer.json", error) from error
    count = algorithm.get_vocab_size()
    if count > file.config.vocab_size:
        raise _damaged(
            file, "tokenizer.json", f"it has {count} tokens, the model {file.config.vocab_size}"
        )
    settings = file.json(_TOKENIZER) if file.has(_TOKENIZER) else {}
    names = {f"{role}_token": _name(settings.get(f"{role}_token")) for role in ("bos", "eos")}
    bos_id = algorithm.token_to_id(names["bos_token"])
    return Tokenizer(
        algorithm,
        bos_id=bos_id if settings.get("add_bos_token") is True else None,
        eos_id=_end_token(file, count, algorithm.token_to_id(names["eos_token"])),
        template=_template(file, settings),
        names=names,
    )


def _end_token(file: Checkpoint, count: int, otherwise: int | None) -> int | None:
    """Return the first token that ends an answer, of `count`; `otherwise` if none is named."""
    generation = file.json(_GENERATION) if file.has(_GENERATION) else {}
    for settings in (generation, file.settings):
        named = settings.get("eos_token_id")
        first = named[0] if isinstance(named, list) and named else named
        if isinstance(first, int) and 0 <= first < count:
            return int(first)
    return otherwise


def _template(file: Checkpoint, settings: Mapping[str, object]) -> str | None:
    """Return the chat template, if there is one."""
    if file.has(_TEMPLATE):
        return file.text(_TEMPLATE)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [each for each in template if isinstance(each, dict)]
        template = next(
            (one.get("template") for one in named if one.get("name") == "default"), None
        )
    return template if isinstance(template, str) else None


def _name(token: object) -> str:
    """Return the text of a special token, which may come with its properties."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _damaged(file: Checkpoint, name: str, reason: object) -> ModelFileError:
    return ModelFileError(
        f"{file.path / name} is no tokenizer of this model ({reason}). Download it again."
    )
