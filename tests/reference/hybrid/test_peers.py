"""The hybrid against two independent implementations, on the same weights."""

import numpy as np
import pytest

import kvcache

from .conftest import load

torch = pytest.importorskip("torch", reason="needs the extra of this name")
transformers = pytest.importorskip("transformers", reason="needs the extra of this name")

pytestmark = pytest.mark.cross_backend

IDS = np.random.default_rng(1).integers(0, 64, size=(2, 150))
CLOSE = {"rtol": 0, "atol": 1e-4}
CALLS = [(150,), (64, 86), (37, 100, 1, 1, 11)]


def calls(sizes):
    """The token ids of each call."""
    return np.split(IDS, np.cumsum(sizes)[:-1], axis=1)


@pytest.fixture(scope="module")
def tiny_numpy(tiny_path):
    return load(tiny_path, kvcache.get_backend("numpy"))


@pytest.mark.parametrize("sizes", CALLS, ids=str)
def test_transformers(tiny_path, tiny_numpy, sizes):
    peer = transformers.Qwen3NextForCausalLM.from_pretrained(tiny_path)
    cache, caches = None, tiny_numpy.make_caches()
    for ids in calls(sizes):
        with torch.no_grad():
            output = peer(torch.tensor(ids), cache=cache, use_cache=True)
        cache = output.past_key_values
        ours = tiny_numpy(ids, caches, last_only=False)
        np.testing.assert_allclose(ours, output.logits.numpy(), **CLOSE)
        np.testing.assert_array_equal(ours.argmax(-1), output.logits.numpy().argmax(-1))


@pytest.mark.parametrize("sizes", CALLS, ids=str)
def test_mlx_lm(tiny_path, tiny_numpy, sizes):
    utils = pytest.importorskip("mlx_lm.utils", reason="needs the extra of this name")
    import mlx.core as mx

    peer, _ = utils.load_model(tiny_path)
    cache, caches = peer.make_cache(), tiny_numpy.make_caches()
    for ids in calls(sizes):
        logits = np.array(peer(mx.array(ids), cache=cache))
        ours = tiny_numpy(ids, caches, last_only=False)
        np.testing.assert_allclose(ours, logits, **CLOSE)
        np.testing.assert_array_equal(ours.argmax(-1), logits.argmax(-1))


def test_a_checkpoint_of_transformers(tmp_path):
    """Files as the installed version writes them, with its own defaults."""
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.1,
    )
    peer = transformers.Qwen3NextForCausalLM(config)
    peer.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load(tmp_path, kvcache.get_backend("torch"))(IDS, last_only=False)
    with torch.no_grad():
        expected = peer(torch.tensor(IDS)).logits
    np.testing.assert_allclose(ours.numpy(), expected.numpy(), **CLOSE)
    assert expected.std() > 0.1
