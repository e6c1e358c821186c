"""A tiny decoder in plain JAX, with the states of kvcache and, as its oracle, without any."""

import numpy as np

from kvcache.adapters.jax import Full, Recurrent, Window, advance, init, layer_of, update

VOCABULARY, WIDTH, HEADS, DIM = 97, 16, 2, 8
MEMORY = Recurrent([((HEADS, DIM, DIM), "float32")])
DECAY = 0.98  # slow, so that early tokens matter


def parameters(layers, seed=0):
    """Weights of that many layers, large enough for the output to vary."""
    rng = np.random.default_rng(seed)

    def weights(*shape):
        return (rng.normal(size=shape) * 2 / np.sqrt(shape[-2])).astype(np.float32)

    return {
        "embedding": weights(VOCABULARY, WIDTH) * 2,
        "layers": [
            {name: weights(WIDTH, WIDTH) for name in ("q", "k", "v", "o")} for _ in range(layers)
        ],
        "head": weights(WIDTH, VOCABULARY),
    }


def angles(positions, xp):
    """A sinusoid of the position, ``[..., WIDTH]``."""
    rates = np.exp(-np.arange(WIDTH // 2) / 3).astype(np.float32)
    turns = xp.asarray(positions, np.float32)[..., None] * rates
    return xp.concatenate([xp.sin(turns), xp.cos(turns)], -1)


def heads(x):
    return x.reshape(*x.shape[:2], HEADS, DIM).swapaxes(1, 2)


def joined(x):
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], WIDTH)


def normal(x):
    return x / ((x * x).mean(-1, keepdims=True) + 1e-6) ** 0.5


def attended(q, keys, values, mask):
    import jax

    scores = q @ keys.swapaxes(-1, -2) * DIM**-0.5
    return jax.nn.softmax(jax.numpy.where(mask, scores, -jax.numpy.inf), -1) @ values


def remembered(memory, q, k, v):
    """Outputs and the memory behind the tokens; one token after the other."""
    import jax

    def token(memory, new):
        q, k, v = new
        memory = memory * DECAY + k[..., :, None] * v[..., None, :]
        return memory, (q[..., None, :] @ memory)[..., 0, :]

    memory, out = jax.lax.scan(
        token, memory, tuple(x.swapaxes(0, 2).swapaxes(1, 2) for x in (q, k, v))
    )
    return memory, out.swapaxes(1, 2).swapaxes(0, 2)


def block(weights, state, x, layer=None):
    """One layer. state: of this layer, or stacked ones and the number of this one."""
    y = normal(x)
    q, k, v = (heads(y @ weights[name]) for name in "qkv")
    if hasattr(state, "arrays"):
        own = state if layer is None else layer_of(state, layer)
        memory, out = remembered(own.arrays[0], q, k, v)
        state = advance(state, q.shape[2], memory, layer=layer)
    else:
        state, *columns = update(state, k, v, layer=layer)
        out = attended(q, *columns)
    return state, x + joined(out) @ weights["o"]


def step(params, states, tokens, positions):
    """Logits ``[B, L, V]`` of tokens ``[B, L]``, layer after layer."""
    import jax.numpy as jnp

    x = jnp.asarray(params["embedding"])[tokens] + angles(positions, jnp)
    after = []
    for weights, before in zip(params["layers"], states, strict=True):
        state, x = block(weights, before, x)
        after.append(state)
    return tuple(after), normal(x) @ params["head"]


def scanned_step(params, states, tokens, positions):
    """The same by a scan over layers, whose weights and states are stacked."""
    import jax
    import jax.numpy as jnp

    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *params["layers"])
    x = jnp.asarray(params["embedding"])[tokens] + angles(positions, jnp)

    def layer(carry, numbered):
        number, weights = numbered
        states, x = carry
        return block(weights, states, x, number), None

    count = jnp.arange(len(params["layers"]))
    (states, x), _ = jax.lax.scan(layer, (states, x), (count, stacked))
    return states, normal(x) @ params["head"]


def visible(kind, query, column):
    """The rule of a layer by the words of its docstring; positions of one row."""
    if column > query or column < 0:
        return False
    if isinstance(kind, Full):
        return True
    return column < kind.sinks or column > query - kind.size


def oracle(params, kinds, tokens, padding=None):
    """Logits of the last token of each row, ``[B, V]``, from all tokens ``[B, T]`` and no state."""
    rows = [
        _of_row(params, kinds, row[count:])
        for row, count in zip(tokens, padding or [0] * len(tokens), strict=True)
    ]
    return np.stack(rows)


def _of_row(params, kinds, tokens):
    x = params["embedding"][tokens][None] + angles(np.arange(len(tokens)), np)
    for weights, kind in zip(params["layers"], kinds, strict=True):
        y = normal(x)
        q, k, v = (heads(y @ weights[name]) for name in "qkv")
        if isinstance(kind, Recurrent):
            out = np.zeros_like(q)
            memory = np.zeros((1, HEADS, DIM, DIM), np.float32)
            for token in range(len(tokens)):
                memory = memory * np.float32(DECAY) + k[:, :, token, :, None] * v[:, :, token, None]
                out[:, :, token] = (q[:, :, token, None] @ memory)[..., 0, :]
        else:
            span = range(len(tokens))
            mask = np.array([[visible(kind, query, column) for column in span] for query in span])
            scores = np.where(mask, q @ k.swapaxes(-1, -2) * DIM**-0.5, -np.inf)
            weights_of = np.exp(scores - scores.max(-1, keepdims=True))
            out = weights_of / weights_of.sum(-1, keepdims=True) @ v
        x = x + joined(out) @ weights["o"]
    return (normal(x) @ params["head"])[0, -1]


def expected(params, kinds, prompt, count, padding=None):
    """Tokens ``[B, count]`` that the oracle chooses greedily behind a prompt."""
    tokens = np.asarray(prompt)
    for _ in range(count):
        chosen = oracle(params, kinds, tokens, padding).argmax(-1)
        tokens = np.concatenate([tokens, chosen[:, None]], 1)
    return tokens[:, np.shape(prompt)[1] :]


def fresh(kinds, batch, max_len=64, **options):
    return init(kinds, batch, max_len, kv_heads=HEADS, head_dim=DIM, dtype="float32", **options)


HYBRID = [Full(), Window(6), MEMORY, Window(4, 2)]
