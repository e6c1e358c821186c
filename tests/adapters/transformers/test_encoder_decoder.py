"""Models with an encoder and a decoder, against their own runs without a cache."""

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import EncoderDecoderCache  # noqa: E402

import kvcache  # noqa: E402
from kvcache.adapters.transformers import ModelCache, make_encoder_decoder_cache  # noqa: E402

from .models import ENCODER_DECODERS, VOCAB, encoder_decoder  # noqa: E402

NAMES = [*ENCODER_DECODERS]
EVERY_RUN = {("deep t5", "beams"), ("whisper", "greedy")}


def inputs_of(model, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "whisper":
        return torch.randn(rows, 8, 100, generator=generator)
    return torch.randint(2, VOCAB, (rows, 9), generator=generator)


def generate(model, inputs, **options):
    # Nothing twice: these models settle on a few tokens.
    options = {"do_sample": False, "max_new_tokens": 40, "no_repeat_ngram_size": 1, **options}
    return model.generate(inputs, **options).tolist()


def greedy(model, cache):
    return generate(model, inputs_of(model), **cache())


def sampling(model, cache):
    torch.manual_seed(3)
    return generate(model, inputs_of(model), do_sample=True, top_k=20, **cache())


def beams(model, cache):
    return generate(model, inputs_of(model), num_beams=3, **cache())


def reset(model, cache):
    options = cache()
    generate(model, inputs_of(model, seed=1), **options)
    if "cache" in options:
        options["cache"].reset()
    return generate(model, inputs_of(model), **options)


def deepcopied(model, cache):
    options = copy.deepcopy(cache())
    return generate(model, inputs_of(model), **options)


WAYS = {each.__name__: each for each in (greedy, sampling, beams, reset, deepcopied)}


def cells():
    for name in NAMES:
        for way in WAYS:
            marks = () if (name, way) in EVERY_RUN else pytest.mark.matrix
            yield pytest.param(name, way, marks=marks)


@pytest.mark.parametrize(("name", "way"), [*cells()])
def test_tokens_are_those_without_a_cache(name, way):
    model, run = encoder_decoder(name), WAYS[way]
    expected = run(model, lambda: {"use_cache": False})
    assert len({token for line in expected for token in line}) >= 20
    assert run(model, lambda: {"cache": make_encoder_decoder_cache(model)}) == expected
    assert run(model, lambda: {"cache": broken(model)}) != expected


class MixedUp(ModelCache):
    """Gives the values of the output of an encoder in reverse."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for layer in self.layers:
            layer.update = exchanging(layer.update)
            layer.__class__ = type("Reversed", (type(layer),), {"values": property(flipped)})


def broken(model):
    cache = make_encoder_decoder_cache(model)
    cache.cross_attention_cache = MixedUp(model.config, cache.cross_attention_cache.caches)
    return cache


def exchanging(update):
    def changed(*args, **kwargs):
        keys, values = update(*args, **kwargs)
        return keys, values.flip(-2)

    return changed


def flipped(layer):
    return layer.kv.state[1].flip(-2)


def test_the_library_has_no_caches_for_all_layers_of_a_deep_decoder():
    model = encoder_decoder("deep t5")
    with pytest.raises(IndexError):
        generate(model, inputs_of(model))
    cache = make_encoder_decoder_cache(model)
    assert len(cache) == len(cache.cross_attention_cache) == 4


def test_the_caches_of_both_halves():
    model = encoder_decoder("bart")
    cache = make_encoder_decoder_cache(model, capacity=100)
    assert isinstance(cache, EncoderDecoderCache)
    generate(model, inputs_of(model), cache=cache)
    halves = cache.self_attention_cache.caches, cache.cross_attention_cache.caches
    assert [half.offset for half in halves] == [40, 9]
    assert halves[0][0].options["capacity"] == 100
    cache.crop(-3)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert [half.offset for half in halves] == [37, 9]
    assert {each.rows for half in halves for each in half} == {2}
    with pytest.raises(kvcache.NotSupportedError, match="stays on the device"):
        cache.self_attention_cache.offload(0)
