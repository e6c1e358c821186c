"""Ask a model of Hugging Face transformers, and see how much of each prompt is reused.

    python examples/transformers_prefix.py MODEL_DIRECTORY
    python examples/transformers_prefix.py DIRECTORY --gguf model.Q4_K_M.gguf

A conversation of three turns, then a branch off its first turn. Every answer is computed without
reuse, too, and has to be the same. Seconds are those to the first token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import BaseStreamer

from kvcache.adapters.transformers import prefix_cache

QUESTIONS = ("What is the capital of France?", "And of Italy?", "Which of them is older?")
BRANCH = "Name a river there."


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model, ask the questions, and print what was reused."""
    parser = argparse.ArgumentParser(description="Prefix reuse in transformers.")
    parser.add_argument("model", help="a directory with a model, or its name on the hub")
    parser.add_argument("--gguf", help="a file in it (needs the packages gguf and accelerate)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of an answer at most")
    given = parser.parse_args(arguments)
    files = {"gguf_file": given.gguf} if given.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(given.model, **files)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32, **files).eval()
    prefix = prefix_cache(model, budget=1 << 30)

    conversation: list[dict[str, str]] = []
    for question in (*QUESTIONS, BRANCH):
        if question == BRANCH:
            conversation = conversation[:2]
        conversation.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        options = {**prompt, "max_new_tokens": given.tokens, "do_sample": False}

        clock = FirstToken()
        with prefix.session(**prompt) as session:
            output = model.generate(**options, cache=session.cache, streamer=clock)
        clock_without = FirstToken()
        cold = model.generate(**options, streamer=clock_without)

        if not torch.equal(output, cold):
            raise SystemExit("the answer with reuse is another one")
        columns = prompt["input_ids"].shape[1]
        answer = tokenizer.decode(output[0, columns:], skip_special_tokens=True).strip()
        conversation.append({"role": "assistant", "content": answer})
        print(f"> {question}\n{answer}")
        print(
            f"[{session.matched[0]} of {columns} tokens reused, {clock.seconds:.2f} s; "
            f"without reuse {clock_without.seconds:.2f} s]"
        )


class FirstToken(BaseStreamer):
    """Measures the seconds until the first token of an answer comes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started, self._calls = time.perf_counter(), 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then each token."""
        self._calls += 1
        if self._calls == 2:
            self.seconds = time.perf_counter() - self._started

    def end(self) -> None:
        """Do nothing."""


if __name__ == "__main__":
    main()
