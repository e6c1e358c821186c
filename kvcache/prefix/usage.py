"""How much of a prompt was reused, in the words of the APIs of servers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """Prompt tokens of one request, for a server that reports what it charges for."""

    prompt_tokens: int
    """All of them."""
    cached_tokens: int
    """Those reused instead of computed."""
    created_cache_tokens: int
    """Those stored by this request so far, and not stored before."""

    def as_openai(self) -> dict[str, object]:
        """Return the part about the prompt of a ``usage`` of OpenAI's API."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def as_anthropic(self) -> dict[str, int]:
        """Return the part about the prompt of a ``usage`` of Anthropic's API.

        The three add up to the prompt. A token that was stored but could not be reused, as the
        last one of every prompt, is among the ``input_tokens``.
        """
        return {
            "input_tokens": self.prompt_tokens - self.cached_tokens - self.created_cache_tokens,
            "cache_creation_input_tokens": self.created_cache_tokens,
            "cache_read_input_tokens": self.cached_tokens,
        }
