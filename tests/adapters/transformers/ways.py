"""Ways to run a model with a cache: each returns the tokens, which no correct cache changes.

A way is called with a model and with ``make``, which makes an empty cache for it.
"""

import copy
from functools import partial

import torch

from .models import VOCAB
from .models import model as model_of

PROMPT, NEW = 23, 30


def prompts(rows=2, tokens=PROMPT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (rows, tokens), generator=generator)


def generate(model, ids, cache, tokens=NEW, **options):
    options = {"do_sample": False, "max_new_tokens": tokens, **options}
    return model.generate(ids, cache=cache, **options)[:, ids.shape[1] :]


def lines(*outputs):
    return [row for tokens in outputs for row in tokens.tolist()]


def greedy(model, make):
    return lines(generate(model, prompts(), make()))


def sampling(model, make):
    torch.manual_seed(3)
    return lines(generate(model, prompts(), make(), do_sample=True, top_k=20))


def beams(model, make):
    return lines(generate(model, prompts(4), make(), num_beams=3))


def chunks(size, model, make):
    return lines(generate(model, prompts(), make(), prefill_chunk_size=size))


def lookup(model, make):
    ids = torch.cat([prompts(1), prompts(1)[:, :10]], 1)
    return lines(generate(model, ids, make(), 45, prompt_lookup_num_tokens=4))


def assisted(model, make):
    assistant = model_of(model.name_in_tests, model.config._attn_implementation, similar=True)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0
    return lines(generate(model, prompts(1), make(), assistant_model=assistant))


def turns(model, make):
    cache, ids, outputs = make(), prompts(), []
    for turn in range(3):
        outputs.append(generate(model, ids, cache, 10))
        ids = torch.cat([ids, outputs[-1], prompts(tokens=4, seed=turn + 1)], 1)
    return lines(*outputs)


def _padded(rows=2):
    ids, mask = prompts(rows), torch.ones(rows, PROMPT, dtype=torch.long)
    ids[0, :7], mask[0, :7] = 0, 0
    return ids, mask


def padded(model, make):
    ids, mask = _padded()
    return lines(generate(model, ids, make(), attention_mask=mask))


def padded_beams(model, make):
    ids, mask = _padded()
    return lines(generate(model, ids, make(), attention_mask=mask, num_beams=2))


def padded_chunks(model, make):
    ids, mask = _padded()
    # Cut inside of the padding, and behind it.
    return lines(generate(model, ids, make(), attention_mask=mask, prefill_chunk_size=5))


def padded_turns(model, make):
    (ids, mask), cache, outputs = _padded(), make(), []
    for turn in range(2):
        outputs.append(generate(model, ids, cache, 12, attention_mask=mask))
        added = torch.cat([outputs[-1], prompts(tokens=4, seed=turn + 1)], 1)
        ids, mask = torch.cat([ids, added], 1), torch.cat([mask, torch.ones_like(added)], 1)
    return lines(*outputs)


def reset(model, make):
    cache = make()
    generate(model, prompts(seed=5), cache)
    cache.reset()
    return lines(generate(model, prompts(), cache))


def deepcopied(model, make):
    cache, start = make(), prompts()
    with torch.no_grad():
        model(start, cache=cache)
    outputs = []
    for branch in (1, 2):
        ids = torch.cat([start, prompts(tokens=3, seed=branch)], 1)
        outputs.append(generate(model, ids, copy.deepcopy(cache), 15))
    ids = torch.cat([start, prompts(tokens=3, seed=3)], 1)
    return lines(*outputs, generate(model, ids, cache, 15))


ROWS = [2, 0, 0, 2]


def reselected(model, make):
    cache = make()
    with torch.no_grad():
        model(prompts(3), cache=cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 3, 1]))
    return _continued(model, cache)


def selected_beforehand(model, make):
    """The oracle of `reselected`, which the library cannot do for recurrent layers."""
    cache = make()
    with torch.no_grad():
        model(prompts(3)[ROWS], cache=cache)
    return _continued(model, cache)


def _continued(model, cache):
    ids = torch.cat([prompts(3)[ROWS], prompts(4, 3, seed=1)], 1)
    return lines(generate(model, ids, cache))


WAYS = {
    "greedy": greedy,
    "sampling": sampling,
    "beams": beams,
    "chunks of 5": partial(chunks, 5),
    "chunks of 1": partial(chunks, 1),
    "lookup": lookup,
    "assisted": assisted,
    "turns": turns,
    "padded": padded,
    "padded beams": padded_beams,
    "padded chunks": padded_chunks,
    "padded turns": padded_turns,
    "reset": reset,
    "deepcopied": deepcopied,
    "reselected": reselected,
}
ORACLES = {"reselected": selected_beforehand}
"""Ways to get what the library cannot compute in the way of this name."""
