"""Sessions of real models on one backend: python sharing.py BACKEND CASES, cases as JSON.

A case is the path of a model, the kind of its caches, and the URL of a store. Prints one line of
JSON for each: how much of the prompt was found, whether the logits are those of a cold run, the
token that follows, and what the prefix cache counted.
"""

import json
import sys
from pathlib import Path

import numpy as np

import kvcache
from kvcache.prefix import PrefixCache
from kvcache.stores import Deadline

PROMPT = [(7 * number) % 61 + 1 for number in range(23)]


def model_in(path, backend):
    if Path(path).is_dir():
        from kvcache.reference.hybrid.checkpoint import Checkpoint
        from kvcache.reference.hybrid.model import Hybrid

        return Hybrid.from_checkpoint(Checkpoint(path), backend)
    from kvcache.reference.llama.gguf import open_gguf
    from kvcache.reference.llama.model import Llama

    return Llama.from_gguf(open_gguf(path), backend)


def fed(model, caches, ids):
    """Logits after `ids`, fed token by token: where every length is compiled, there is only one."""
    for token in ids:
        logits = model([[int(token)]], caches)
    return model.backend.to_host(logits)


def main(backend, cases):
    backend = kvcache.get_backend(backend)
    for path, kind, url in cases:
        model = model_in(path, backend)
        caches = model.make_caches(kind, max_size=12, keep=2)
        prefix = PrefixCache(caches, store=url, namespace=Path(path).name, page_tokens=8)
        with prefix.session(PROMPT, deadline=Deadline.after(120)) as session:
            logits = fed(model, session.caches, session.remaining)
        cold = fed(model, caches, PROMPT)
        counts = prefix.stats.store
        assert prefix.close(Deadline.after(120))
        print(
            json.dumps(
                {
                    "matched": session.matched,
                    "right": bool(np.allclose(logits, cold, rtol=1e-4, atol=1e-4)),
                    "differs": float(abs(logits - cold).max()),
                    "token": int(logits.argmax()),
                    "failed": counts.failed + counts.late,
                }
            )
        )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
