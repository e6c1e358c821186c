"""Caches of a fixed size, in programs of torch."""

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import CompileConfig, DynamicCache  # noqa: E402

import kvcache  # noqa: E402
from kvcache.adapters.transformers import make_cache  # noqa: E402

from .models import first, model  # noqa: E402
from .ways import NEW, PROMPT, WAYS, generate, lines, prompts  # noqa: E402

CAPACITY = 80
NAMES = ["llama", "mistral", "gemma3", "gemma3n"]


def fixed(built, capacity=CAPACITY):
    return make_cache(built, capacity=capacity, compileable=True)


@pytest.fixture
def compiled():
    """Options of generate that compile its steps, and the graphs that were compiled."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, backend=keep, mode=None)
    config._compile_all_devices = True
    yield {"compile_config": config}, graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("name", first(["mistral", "llama", "gemma3", "gemma3n"]))
def test_one_graph_for_all_steps(name, compiled):
    options, graphs = compiled
    built = copy.copy(model(name, "sdpa"))  # which keeps its compiled call
    expected = lines(generate(built, prompts(), DynamicCache(config=built.config)))
    cache = fixed(built)
    assert cache.is_compileable
    assert lines(generate(built, prompts(), cache, **options)) == expected
    assert len(graphs) == 1
    assert cache.caches.offset == PROMPT + NEW - 1
    assert lines(generate(built, prompts(), fixed(built), **options)) == expected
    assert len(graphs) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "reselected"])
@pytest.mark.matrix
def test_tokens_are_those_of_the_library(name, way):
    built = model(name)
    expected = WAYS[way](built, lambda: DynamicCache(config=built.config))
    assert WAYS[way](built, lambda: fixed(built)) == expected


@pytest.mark.parametrize("way", first(["turns", "assisted", "padded beams", "reselected"]))
def test_a_fixed_cache_does_what_others_do(way):
    built = model("mistral")
    expected = WAYS[way](built, lambda: make_cache(built))
    assert WAYS[way](built, lambda: fixed(built)) == expected


def test_going_on_from_tokens_of_another_cache():
    built = model("llama")
    cache = make_cache(built)
    with torch.no_grad():
        built(prompts(), cache=cache)
    snapshot = cache.caches.snapshot()
    again = fixed(built)
    again.caches.restore(snapshot)
    ids = torch.cat([prompts(), prompts(tokens=3, seed=1)], 1)
    assert again.layers[0].keys.shape[-2] == PROMPT
    assert lines(generate(built, ids, again)) == lines(generate(built, ids, cache))


def test_too_many_tokens():
    built = model("llama")
    cache = fixed(built, 30)
    assert cache.get_max_length() == 30
    with pytest.raises(kvcache.CacheFullError, match=r"got 30 \+ 1 > 30\. Raise capacity"):
        generate(built, prompts(), cache)
    assert cache.caches.offset == 30
    with pytest.raises(kvcache.CacheFullError, match=r"got 0 \+ 31 > 30"):
        generate(built, prompts(tokens=31), fixed(built, 30))


def test_refusals():
    with pytest.raises(ValueError, match="has a fixed capacity, 1 or more; got capacity=0"):
        make_cache(model("llama"), compileable=True)
    with pytest.raises(kvcache.NotSupportedError, match="this model has recurrent ones"):
        fixed(model("qwen3_next"))


class Exported(torch.nn.Module):
    def __init__(self, built, cache):
        super().__init__()
        self.model, self.cache = built, cache
        for index, layer in enumerate(cache.layers):
            for name, buffer in layer.buffers.items():
                self.register_buffer(f"{name}{index}", buffer, persistent=False)

    def forward(self, ids, positions):
        return self.model(ids, position_ids=positions, cache=self.cache).logits


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_an_exported_program():
    built, ids = model("llama", "sdpa"), prompts(1, 9)
    cache = fixed(built)
    assert cache.layers[0].buffers == {}
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    assert [*cache.layers[0].buffers] == ["keys", "values", "offset", "written"]
    with torch.no_grad():
        expected = built(ids).logits
        inputs = ids[:, :1], torch.tensor([[0]])
        step = torch.export.export(Exported(built, cache), inputs, strict=True).module()
        steps = [step(ids[:, i : i + 1], torch.tensor([[i]])) for i in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=1e-4)
