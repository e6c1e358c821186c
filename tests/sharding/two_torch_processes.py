"""One of two processes of torch that decode together, run by `test_processes.py`.

python two_torch_processes.py RANK FILE
"""

import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import kvcache
from kvcache import Batch, CausalCache, KVCache, RotatingKVCache, StateCache, functional

HEADS, DIM, STEPS = 4, 8, 9


def refused(call):
    """The call is refused for its DTensor, with the way out."""
    with pytest.raises(kvcache.UnknownBackendError, match=r"DTensor.*\.to_local\(\)"):
        call()


def check_refusals(whole):
    keys = whole.to_local()
    for cache in (KVCache(), KVCache("torch"), RotatingKVCache(4)):
        refused(lambda: cache.update(whole, whole))  # noqa: B023 - called at once
        refused(lambda: cache.update(keys, whole))  # noqa: B023
        assert (cache.offset, cache.nbytes) == (0, 0)
        cache.update(keys, keys)
        refused(lambda: cache.update(whole, whole))  # noqa: B023
        assert cache.offset == keys.shape[2]
    refused(lambda: StateCache().advance(1, whole))
    pool = CausalCache()
    pool.init("torch", max_sequences=1, capacity=16, max_batch=16)
    pool.start_forward(Batch(range(keys.shape[2]), [0] * keys.shape[2]))
    refused(lambda: pool.put(whole[0], whole[0]))
    pool.put(keys[0], keys[0])
    state = functional.empty([keys.shape] * 2, "float32", backend="torch")
    refused(lambda: functional.append(state, whole, whole))
    assert not kvcache.get_backend("torch").owns(whole)


def decode(cache, arrays):
    """Attends with each token in turn; what it gives, over the head_dims of all heads."""
    outputs = []
    for step in range(STEPS):
        k, v, q = (array[:, :, step : step + 1] for array in arrays)
        keys, values = cache.update(k, v)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, keys, values, attn_mask=cache.mask(1)
            )
        )
    return torch.cat(outputs, 2)


def main(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    arrays = torch.randn(3, 1, HEADS, STEPS, DIM, generator=torch.Generator().manual_seed(0))
    parts = [distribute_tensor(array, mesh, [Shard(1)]) for array in arrays]
    check_refusals(parts[0])
    for make in (KVCache, lambda: RotatingKVCache(5, 1)):
        local = decode(make(), [part.to_local() for part in parts])
        together = DTensor.from_local(local, mesh, [Shard(1)]).full_tensor()
        torch.testing.assert_close(together, decode(make(), arrays))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
