"""Caches in the attention modules of a flax model, next to flax's own decode mode and to none."""

import inspect
from functools import cache

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs pip install 'kvcache[flax]'")
flax = pytest.importorskip("flax", reason="needs pip install 'kvcache[flax]'")

from flax import nnx  # noqa: E402

from kvcache import KVCacheError, NotSupportedError, ShapeError, TrimError, functional  # noqa: E402
from kvcache.adapters.flax import Attached, CachedAttention, KVState, attach  # noqa: E402

pytestmark = pytest.mark.one_backend(name="jax")
jnp = jax.numpy

VOCABULARY, WIDTH, LENGTH, ROWS, PROMPT, COUNT = 97, 16, 64, 2, 9, 32
MOVED = (
    "flax {}: {} has moved. kvcache.adapters.flax stands on it: look at {} there, and mend it "
    "before the version is raised."
)


class Block(nnx.Module):
    def __init__(self, rngs, kv_heads, normalize, scale=2.0):
        kernel = nnx.initializers.normal(scale / WIDTH**0.5)
        self.attention = nnx.MultiHeadAttention(
            4, WIDTH, num_kv_heads=kv_heads, decode=False, normalize_qk=normalize,
            kernel_init=kernel, rngs=rngs,
        )  # fmt: skip
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        return x + self.attention(self.norm(x), mask=mask)


class Decoder(nnx.Module):
    """A model that knows nothing of caches: tokens and positions in, logits out."""

    def __init__(self, kv_heads=4, normalize=False, layers=2):
        rngs = nnx.Rngs(0)
        self.embedding = nnx.Embed(
            VOCABULARY, WIDTH, embedding_init=nnx.initializers.normal(2.0), rngs=rngs
        )
        self.blocks = nnx.List([Block(rngs, kv_heads, normalize) for _ in range(layers)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens, positions, mask=None):
        turns = positions[..., None] * jnp.exp(-jnp.arange(WIDTH // 2) / 3)
        x = self.embedding(tokens) + jnp.concatenate([jnp.sin(turns), jnp.cos(turns)], -1)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


MODELS = {"heads": {}, "grouped": {"kv_heads": 2}, "normalized": {"kv_heads": 1, "normalize": True}}


def matrix(value):
    """A cell that only `nox -s adapters` runs."""
    return pytest.param(value, marks=pytest.mark.matrix)


NAMES = [matrix("heads"), "grouped", matrix("normalized")]


def prompt():
    return np.random.default_rng(1).integers(0, VOCABULARY, (ROWS, PROMPT)).astype(np.int32)


@nnx.jit
def run(model, tokens, positions, mask=None):
    """One program for each shape; the states of the model are part of it."""
    return model(tokens, positions, mask)


def chosen(logits):
    return np.asarray(logits[:, -1].argmax(-1), np.int32)[:, None]


def causal(length, window=None, padding=(0, 0)):
    """The masks of rows of tokens without a cache, ``[ROWS, 1, length, length]``."""
    query, column = np.arange(length)[:, None], np.arange(length)
    seen = (column <= query) & (column > query - (window or length))
    rows = [seen & (column >= count) | (query == column) for count in padding]
    return np.stack(rows)[:, None]


@cache
def model_of(name):
    return Decoder(**MODELS[name])


@cache
def uncached(name, window=None, padding=(0, 0)):
    """Tokens ``[ROWS, COUNT]`` by the whole text in each step, of a model without a cache."""
    tokens, model = np.zeros((ROWS, PROMPT + COUNT), np.int32), model_of(name)
    tokens[:, :PROMPT] = prompt()
    positions = np.arange(PROMPT + COUNT) - np.array(padding)[:, None]
    mask = jnp.asarray(causal(PROMPT + COUNT, window, padding))
    for position in range(PROMPT, PROMPT + COUNT):
        logits = run(model, tokens, positions, mask)
        tokens[:, position] = np.asarray(logits[:, position - 1].argmax(-1))
    return tokens[:, PROMPT:]


def generated(model, chunks=(PROMPT,), padding=(0, 0), masked=False, between=lambda: None):
    """Tokens ``[ROWS, COUNT]`` with what the model has as a cache."""
    own, start = np.array(padding)[:, None], 0
    for size in chunks:
        text = prompt()[:, start : start + size]
        mask = nnx.make_causal_mask(text) if masked else None
        logits = run(model, text, np.arange(start, start + size) - own, mask)
        start += size
    assert start == PROMPT
    tokens = [chosen(logits)]
    for position in range(PROMPT, PROMPT + COUNT - 1):
        between()
        tokens.append(chosen(run(model, tokens[-1], np.array([[position]]) - own)))
    return np.concatenate(tokens, 1)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_vary(name):
    assert len(set(uncached(name).ravel().tolist())) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_flax_itself_one_token_at_a_time(name):
    """The oracle is what flax's decode mode gives, which takes a prompt token by token."""
    model = Decoder(**MODELS[name])
    for block in model.blocks:
        block.attention.decode = True
        block.attention.init_cache((ROWS, LENGTH, WIDTH))
    np.testing.assert_array_equal(generated(model, [1] * PROMPT), uncached(name))


@pytest.mark.parametrize("masked", [matrix(False), True])
@pytest.mark.parametrize("chunks", [matrix([9]), [5, 4], matrix([1] * 9)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_tokens(name, chunks, masked):
    model, expected = model_of(name), uncached(name)
    with attach(model, ROWS, LENGTH) as caches:
        np.testing.assert_array_equal(generated(model, chunks, masked=masked), expected)
        assert int(caches.offset) == PROMPT + COUNT - 1


@pytest.mark.parametrize("window", [4, matrix(20)])
@pytest.mark.parametrize("chunks", [[5, 4], matrix([9])], ids=str)
def test_windows(window, chunks):
    model, expected = model_of("grouped"), uncached("grouped", window)
    with attach(model, ROWS, LENGTH, window=window) as caches:
        np.testing.assert_array_equal(generated(model, chunks), expected)
        assert {state.keys.shape[1] for state in caches.states.values()} == {window}
        with pytest.raises(TrimError, match="a ring cannot go back"):
            caches.trim(1)


def test_a_window_for_each_module():
    model = model_of("heads")
    with attach(model, ROWS, LENGTH, window=lambda path: 8 if path[1] else None) as caches:
        kinds = {path[1]: type(state) for path, state in caches.states.items()}
    assert kinds == {0: functional.LayerState, 1: functional.RingState}


@pytest.mark.parametrize("on_device", [matrix(False), True])
def test_rows_of_unequal_length(on_device):
    padding = (3, 0)
    given = jnp.array(padding) if on_device else padding
    model, expected = model_of("grouped"), uncached("grouped", None, padding)
    with attach(model, ROWS, LENGTH, padding=given):
        np.testing.assert_array_equal(generated(model, [5, 4], padding), expected)


@pytest.mark.parametrize("window", [None, matrix(5)])
def test_a_broken_cache_shows(window):
    """Values of ten times the size in one module alone change the tokens."""
    model, expected = model_of("grouped"), uncached("grouped", window)
    for number in range(2):
        with attach(model, ROWS, LENGTH, window=window) as caches:
            turns = iter(range(COUNT))

            def spoil(number=number, caches=caches, turns=turns):
                if next(turns) == 0:
                    states = caches.states
                    path = sorted(states)[number]
                    states[path] = states[path]._replace(values=-10 * states[path].values)
                    caches.states = states

            tokens = generated(model, between=spoil)
        assert (tokens != expected).any()


def test_beams_and_going_back():
    model, expected = model_of("grouped"), uncached("grouped")
    swap, turns = jnp.array([1, 0], jnp.int32), []
    with attach(model, ROWS, LENGTH) as caches:

        @nnx.jit
        def propose(model):
            model(jnp.full((ROWS, 3), 7), jnp.zeros((1, 3)))
            inside = Attached(model)
            inside.trim(3)
            inside.select(swap)
            inside.select(swap)

        tokens = generated(model, between=lambda: turns.append(propose(model)))
        np.testing.assert_array_equal(tokens, expected)
        caches.select(jnp.array([1], jnp.int32))
        assert {state.keys.shape[0] for state in caches.states.values()} == {1}
    assert len(turns) == COUNT - 1


def test_states_go_through_a_program_of_plain_jax():
    """``nnx.split`` tells states from weights; the states alone are donated, and stay in place."""
    model, expected = model_of("grouped"), uncached("grouped")
    traced = []
    with attach(model, ROWS, LENGTH):
        token = chosen(run(model, prompt(), np.arange(PROMPT)))
        graph, states, rest = nnx.split(model, nnx.Cache, ...)

        def step(states, rest, token, position):
            traced.append(token.shape)
            merged = nnx.merge(graph, states, rest)
            logits = merged(token, position[None, None])
            return nnx.state(merged, nnx.Cache), logits[:, -1].argmax(-1).astype(jnp.int32)[:, None]

        compiled = jax.jit(step, donate_argnums=0)
        held = jax.tree.leaves(states)
        program = compiled.lower(states, rest, token, jnp.int32(0)).compile()
        buffers = [
            array.unsafe_buffer_pointer() for array in held if array.ndim == 4 and array.size
        ]
        assert program.memory_analysis().alias_size_in_bytes >= sum(array.nbytes for array in held)
        tokens = [token]
        for position in range(PROMPT, PROMPT + COUNT - 1):
            states, token = compiled(states, rest, token, jnp.int32(position))
            tokens.append(token)
        after = [
            a.unsafe_buffer_pointer() for a in jax.tree.leaves(states) if a.ndim == 4 and a.size
        ]
        assert sorted(after) == sorted(buffers)
        np.testing.assert_array_equal(np.concatenate(tokens, 1), expected)
        nnx.update(model, states)
        assert int(Attached(model).offset) == PROMPT + COUNT - 1
    assert traced == [(ROWS, 1)]


def test_a_step_moves_no_more_than_one_of_flax():
    """Bytes and compilations of a decode step, next to those of flax's own decode mode."""

    def moved(model):
        graph, states, rest = nnx.split(model, nnx.Cache, ...)

        def step(states, rest, token, position):
            merged = nnx.merge(graph, states, rest)
            logits = merged(token, position)
            return nnx.state(merged, nnx.Cache), logits

        arguments = states, rest, jnp.zeros((8, 1), jnp.int32), jnp.zeros((8, 1))
        program = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
        return program.cost_analysis()["bytes accessed"]

    model, own = Decoder(), Decoder()
    for block in own.blocks:
        block.attention.decode = True
        block.attention.init_cache((8, 512, WIDTH))
    with attach(model, 8, 512):
        assert moved(model) <= 1.05 * moved(own)


def test_detached_it_is_as_before():
    model = Decoder()
    model.blocks[0].attention.decode = None
    before = nnx.graphdef(model)
    with attach(model, ROWS, LENGTH, only=lambda path: path[1] == 0) as caches:
        assert list(caches.states) == [("blocks", 0, "attention")]
        assert isinstance(model.blocks[0].attention.attention_fn, CachedAttention)
        assert model.blocks[0].attention.decode is False
        assert isinstance(model.blocks[0].attention.attention_fn.state, KVState)
    assert nnx.graphdef(model) == before
    with pytest.raises(KVCacheError, match="has no caches"):
        Attached(model)


def test_another_dtype():
    model = Decoder()
    with attach(model, ROWS, LENGTH, dtype="bfloat16") as caches:
        model(prompt(), np.arange(PROMPT))
        assert {state.likes[0].dtype for state in caches.states.values()} == {jnp.dtype("bfloat16")}


def test_masks_of_the_model():
    """A mask over the new tokens, or over all columns, hides what the model wants hidden."""
    model, x = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0)), jnp.ones((1, 4, 8))
    x = x * jnp.arange(1, 5)[:, None]
    seen = np.tri(4, dtype=bool) & (np.arange(4) != 1) | np.eye(4, dtype=bool)
    expected = model(x, mask=seen[None, None])
    for widths in (4, 16):
        with attach(model, 1, 16):
            mask = np.pad(seen, ((0, 0), (0, widths - 4)))[None, None]
            np.testing.assert_allclose(model(x, mask=jnp.asarray(mask)), expected, rtol=1e-5)
            with pytest.raises(ShapeError, match="over the 4 new tokens, or over all 16 columns"):
                model(x, mask=jnp.ones((1, 1, 4, 7), bool))


def test_refusals():
    model = Decoder()
    with pytest.raises(NotSupportedError, match="Linear has none"):
        attach(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 1, 8)
    with pytest.raises(NotSupportedError, match="Decoder has none that only= takes"):
        attach(model, 1, 8, only=lambda path: False)
    with pytest.raises(ValueError, match="batch must be >= 1"):
        attach(model, 0, 8)
    with attach(model, ROWS, LENGTH) as caches:
        with pytest.raises(KVCacheError, match=r"blocks\.0\.attention has a cache\. Call detach"):
            attach(model, ROWS, LENGTH)
        x = jnp.ones((ROWS, 3, WIDTH))
        with pytest.raises(NotSupportedError, match="Leave a module of cross-attention"):
            model.blocks[0].attention(x, x[:, :2])
        with pytest.raises(ShapeError, match="keys and values match their buffer"):
            model.blocks[0].attention(x[:1])
        with pytest.raises(ValueError, match="states are of the modules with a cache"):
            caches.states = {}
        assert int(caches.offset) == 0

    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs):
        return Block(rngs, 4, False)

    with pytest.raises(NotSupportedError, match="layers stacked for"):
        attach(stacked(nnx.Rngs(0).split(2)), 1, 8)


def test_protocol_of_flax():
    """A canary: what the adapter stands on, with what to look at when it has moved."""

    def check(holds, moved, look):
        assert holds, MOVED.format(flax.__version__, moved, look)

    module = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    names = ["attention_fn", "decode", "dtype", "param_dtype", "num_kv_heads", "head_dim", "query"]
    for name in names:
        check(hasattr(module, name), f"MultiHeadAttention.{name}", "attach.attach")
    check(module.query.kernel.shape == (8, 2, 4), "the shape of a kernel", "attach._check")
    called = []

    def attend(*arrays, **options):
        called.append(([array.shape for array in arrays], set(options)))
        return arrays[0]

    module.attention_fn = attend
    module(jnp.ones((1, 3, 8)), mask=jnp.ones((1, 1, 3, 3)))
    check(len(called) == 1, "the one call of attention_fn", "CachedAttention.__call__")
    shapes, options = called[0]
    check(
        shapes == [(1, 3, 2, 4)] * 3, "query, key, value as [B, L, heads, dim]", "CachedAttention"
    )
    check(
        {"mask", "is_causal"} <= options, "mask= and is_causal= of attention_fn", "CachedAttention"
    )
    parameters = inspect.signature(nnx.dot_product_attention).parameters
    check({"mask", "is_causal"} <= set(parameters), "dot_product_attention", "CachedAttention")
    for name in ("data", "static", "iter_modules", "Cache", "split", "merge", "update"):
        check(hasattr(nnx, name), f"nnx.{name}", "attach")
    module.attention_fn = nnx.data(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    paths = [path for path, _ in nnx.iter_modules(module)]
    check(("attention_fn",) in paths, "a module in the place of attention_fn", "attach.attach")


def own_mode(**options):
    """A module in flax's own decode mode, with four columns."""
    module = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0), **options)
    module.init_cache((1, 4, 8))
    return module


def test_what_decode_mode_of_flax_cannot_do():
    """The pitfalls that the page names."""
    x = jnp.sin(jnp.arange(48.0)).reshape(1, 6, 8)
    with pytest.raises(ValueError, match="Autoregressive cache shape error"):
        own_mode()(x[:, :2])
    module = own_mode()
    for position in range(5):
        full = jnp.array(module.cached_key[...])
        module(x[:, position : position + 1])
    assert (module.cached_key[...][:, :3] == full[:, :3]).all()
    assert (module.cached_key[...][:, 3] != full[:, 3]).any()  # the last token is gone
    plain, first_only = own_mode(), own_mode()
    for position in range(3):
        token = x[:, position : position + 1]
        expected, alone = plain(token), first_only(token, is_causal=True)
    first = own_mode()(x[:, :1])
    np.testing.assert_allclose(alone, first, rtol=1e-5)
    assert not np.allclose(alone, expected)
    module = own_mode()
    with attach(module, 1, 6):
        np.testing.assert_allclose(module(x[:, :3], is_causal=True)[:, 2:], expected, rtol=1e-4)
