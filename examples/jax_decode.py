"""Generate with a plain JAX model: weights in a dict, a scan over layers, a scan over tokens.

pip install 'kvcache[jax]'
python examples/jax_decode.py
"""

from __future__ import annotations

from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvcache.adapters.jax import States, init, update

LAYERS, BATCH, HEADS, DIM, VOCABULARY = 4, 2, 4, 16, 100
WIDTH = HEADS * DIM
Carry: TypeAlias = tuple[States, Array]


def random_weights(seed: int) -> dict[str, Array]:
    """Return weights whose leading axis counts the layers, but for embedding and head."""
    shapes = dict.fromkeys(("q", "k", "v", "o"), (LAYERS, WIDTH, WIDTH))
    shapes |= {"embedding": (VOCABULARY, WIDTH), "head": (WIDTH, VOCABULARY)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, shape) * WIDTH**-0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def forward(weights: dict[str, Array], states: States, tokens: Array) -> tuple[States, Array]:
    """Return the states after `tokens`, ``[BATCH, L]``, and the logits of the last one."""

    def layer(carry: Carry, numbered: tuple[Array, ...]) -> tuple[Carry, None]:
        states, x = carry
        number, *matrices = numbered
        q, k, v = (
            (x @ matrix).reshape(BATCH, -1, HEADS, DIM).swapaxes(1, 2) for matrix in matrices[:3]
        )
        # The stacked states are carried and only the new tokens written. As inputs and outputs of
        # the scan they would be copied whole in every step.
        states, keys, values, mask = update(states, k, v, layer=number)
        scores = jnp.where(mask, q @ keys.swapaxes(-1, -2) * DIM**-0.5, -jnp.inf)
        found = (jax.nn.softmax(scores) @ values).swapaxes(1, 2).reshape(x.shape)
        return (states, x + found @ matrices[3]), None

    stacked = jnp.arange(LAYERS), *(weights[name] for name in ("q", "k", "v", "o"))
    (states, x), _ = lax.scan(layer, (states, weights["embedding"][tokens]), stacked)
    return states, x[:, -1] @ weights["head"]


@partial(jax.jit, static_argnames="count", donate_argnames="states")
def generate(
    weights: dict[str, Array], states: States, prompt: Array, count: int
) -> tuple[Array, States]:
    """Return `count` tokens behind a prompt, ``[BATCH, count]``, and the states after them."""
    states, logits = forward(weights, states, prompt)

    def step(carry: Carry, _: None) -> tuple[Carry, Array]:
        states, token = carry
        states, logits = forward(weights, states, token[:, None])
        return (states, logits.argmax(-1)), token

    (states, _), tokens = lax.scan(step, (states, logits.argmax(-1)), None, count)
    return tokens.T, states


def main() -> None:
    """Generate 16 tokens."""
    states = init(
        LAYERS, BATCH, max_len=64, kv_heads=HEADS, head_dim=DIM, dtype="float32", stacked=True
    )
    prompt = jnp.array([[1, 2, 3], [4, 5, 6]])
    tokens, _ = generate(random_weights(0), states, prompt, 16)
    for row in tokens.tolist():
        print(*row)


if __name__ == "__main__":
    main()
