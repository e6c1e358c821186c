"""A chat with a model of mlx-lm, and another one behind the same instructions.

    python examples/mlx_lm_prefix.py MODEL        # a folder, or a name that mlx-lm can load

Prints for each request how many tokens of its prompt were reused, and the answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import mlx_lm

from kvcache.adapters.mlx_lm import prefix_cache

INSTRUCTIONS = "You answer briefly. You never guess, and you say so if you do not know."
CHATS = [
    ["Name a river.", "Which country is it in?", "How long is it?", "Name another one."],
    ["Name a mountain."],
    ["Name a lake."],
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model, ask the questions, and print what was reused."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--max-tokens", type=int, default=24)
    options = parser.parse_args(arguments)

    model, tokenizer = mlx_lm.load(options.model)
    prefix = prefix_cache(model, budget=1 << 30)
    for questions in CHATS:
        messages = [{"role": "system", "content": INSTRUCTIONS}]
        for question in questions:
            messages.append({"role": "user", "content": question})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            reused = prefix.prefix.lookup(prompt).matched
            responses = prefix.stream_generate(tokenizer, prompt, max_tokens=options.max_tokens)
            answer = "".join(response.text for response in responses)
            print(f"{reused:4} of {len(prompt):4} tokens reused: {question} {answer.strip()}")
            messages.append({"role": "assistant", "content": answer})
    stats = prefix.prefix.stats
    print(f"{stats.matched} of {stats.tokens} tokens reused, {stats.nbytes / 1e6:.1f} MB stored")


if __name__ == "__main__":
    main()
