"""Questions and answers for a small chat model, from text that ships with Python."""

from __future__ import annotations

import builtins
import codecs
import inspect
import io
import random
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import NamedTuple

END = "<|end|>"
SPECIAL = [f"<|{role}|>" for role in ("system", "user", "assistant")] + [END]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LONGEST = 100
"""Characters of an answer, at most."""
_GREETING = "Hello! Name something of Python, such as len or str.join, or say zen."


class Pair(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


def pairs() -> list[Pair]:
    """Return what the model learns by heart: names of Python with their meaning, and the Zen.

    The texts are those of the running version of Python.
    """
    known = {name: text for name, text in _documented() if len(text) <= LONGEST}
    zen = {f"zen {number}": line for number, line in enumerate(_zen(), 1)}
    talk = {"hello": _GREETING, "hi": _GREETING, "zen": zen["zen 1"], "thanks": "You are welcome."}
    return [Pair(*pair) for pair in (known | zen | talk).items()]


def shuffled(known: list[Pair], rng: random.Random) -> Iterator[Pair]:
    """Yield all pairs in a random order, and again in another one, without end."""
    while True:
        yield from rng.sample(known, len(known))


def conversation(turns: Iterator[Pair], characters: int) -> list[Pair]:
    """Take turns of so many characters together, or a few more."""
    taken: list[Pair] = []
    while sum(len(turn.question) + len(turn.answer) for turn in taken) < characters:
        taken.append(next(turns))
    return taken


def _documented() -> Iterator[tuple[str, str]]:
    """Yield public names with the first sentence of their docstrings."""
    owners = {"": builtins, "str.": str, "list.": list, "dict.": dict, "set.": set}
    for prefix, owner in owners.items():
        for name, value in vars(owner).items():
            sentence = _sentence(inspect.getdoc(value) or "")
            # Exceptions are many, and their docstrings say little.
            exception = isinstance(value, type) and issubclass(value, BaseException)
            if not name.startswith("_") and callable(value) and sentence and not exception:
                yield prefix + name, sentence


def _sentence(text: str) -> str:
    """Return the first sentence of a docstring, without a signature in front; "" for none."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    prose = [part for part in paragraphs if re.match(r"[A-Z][a-z]*[ -]", part)]
    return re.split(r"(?<=[.!?]) ", prose[0])[0] if prose and prose[0].isascii() else ""


def _zen() -> list[str]:
    """Return the lines of the Zen of Python."""
    with redirect_stdout(io.StringIO()):  # it prints itself when it is first imported
        import this
    return codecs.decode(this.s, "rot13").splitlines()[2:]
