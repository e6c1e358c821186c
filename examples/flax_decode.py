"""Generate with a flax model that knows nothing of caches.

pip install 'kvcache[flax]'
python examples/flax_decode.py
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from kvcache.adapters.flax import attach

VOCABULARY, WIDTH, BATCH = 100, 64, 2


class Decoder(nnx.Module):
    """Two layers of attention, eight heads that share two of keys and values."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.List(
            [
                nnx.MultiHeadAttention(8, WIDTH, num_kv_heads=2, decode=False, rngs=rngs)
                for _ in range(2)
            ]
        )
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        """Return logits ``[BATCH, L, VOCABULARY]``."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x, mask=nnx.make_causal_mask(tokens))
        return self.head(x)


@nnx.jit
def step(model: Decoder, tokens: Array) -> Array:
    """Return the token behind each row of `tokens`, ``[BATCH, 1]``."""
    return model(tokens)[:, -1:].argmax(-1)


def main() -> None:
    """Generate 16 tokens, with a cache and without."""
    model, prompt = Decoder(nnx.Rngs(0)), jnp.array([[1, 2, 3], [4, 5, 6]])

    with attach(model, BATCH, max_len=64):
        tokens = [step(model, prompt)]
        while len(tokens) < 16:
            tokens.append(step(model, tokens[-1]))

    text = prompt
    for token in tokens:  # the whole text in every step
        if not (step(model, text) == token).all():
            raise RuntimeError("a token differs from that without a cache")
        text = jnp.concatenate([text, token], 1)
    for row in text[:, 3:].tolist():
        print(*row)


if __name__ == "__main__":
    main()
