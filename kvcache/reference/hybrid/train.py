"""Train a small hybrid to chat with, in a minute or two on a CPU.

::

    python -m kvcache.reference.hybrid.train small-hybrid
    kvcache chat --model small-hybrid

It learns by heart what ships with Python: names with their docstrings, and the Zen. torch
differentiates through the very code that every backend runs; nothing is written twice.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError("training needs torch. pip install 'kvcache[demo,torch]'") from error

from kvcache.backends import Backend, HostArray, get_backend
from kvcache.backends.arrays import NativeArray
from kvcache.reference.generate import generate
from kvcache.reference.tokenizer import Tokenizer

from .config import HybridConfig, Settings
from .corpus import END, SPECIAL, TEMPLATE, Pair, conversation, pairs, shuffled
from .model import Hybrid
from .saving import byte_tokenizer, save_checkpoint
from .weights import MLP, Attention, DeltaNet, Layer, Weights

STEPS = 250
BATCH, LENGTH = 8, 256
LEARNING_RATE, WARMUP = 4e-3, 20
CHUNK = 16  # tokens that the delta rule computes at once: few cost less, and differ in rounding
SLOWEST_DECAY = -1e-4  # log of the decay per token, which must stay below 0
SETTINGS: Settings = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": 256 + len(SPECIAL),
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "intermediate_size": 192,
    "num_experts": 0,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
}


def train(
    settings: Settings = SETTINGS,
    steps: int = STEPS,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> Hybrid:
    """Train a model on torch's CPU to answer the questions of the corpus.

    settings: of a model without experts, with the vocabulary of :func:`byte_tokenizer`.
    progress: called with steps done, steps in all, and the loss in nats per token, after each.

    Raises: ValueError for less than one step.
    """
    if steps < 1:
        raise ValueError(f"training takes 1 step or more; got {steps}.")
    backend, config = get_backend("torch:cpu"), HybridConfig.from_settings(settings)
    turns = shuffled(pairs(), random.Random(seed))  # noqa: S311 - no secret
    weights = random_weights(config, np.random.default_rng(seed), backend)
    # By identity: a tied head is the embedding.
    parameters = list({id(array): array.requires_grad_() for array in _arrays(weights)}.values())
    model = Hybrid(config, weights, backend, CHUNK)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    tokenizer = Tokenizer(byte_tokenizer(SPECIAL))
    for done in range(steps):
        optimizer.param_groups[0]["lr"] = _learning_rate(done, steps)
        loss = _loss(model, *_examples(turns, tokenizer))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _keep_decaying(weights)
        if progress:
            progress(done + 1, steps, loss.item())
    for array in parameters:
        array.requires_grad_(False)
    return model


def random_weights(config: HybridConfig, rng: np.random.Generator, backend: Backend) -> Weights:
    """Draw the weights of a model without experts, to begin a training with."""
    c, depth = config, (2 * config.layers) ** -0.5

    def matrix(rows: int, columns: int, scale: float = 1.0) -> NativeArray:
        drawn = rng.normal(scale=scale * rows**-0.5, size=(rows, columns))
        return backend.from_host(drawn.astype(np.float32))

    def numbers(values: HostArray) -> NativeArray:
        return backend.from_host(np.asarray(values, np.float32))

    def attention() -> Attention:
        wide = c.heads * c.head_dim
        rows = 2 * wide + 2 * c.kv_heads * c.head_dim
        ones = np.ones(c.head_dim)
        return Attention(
            matrix(c.hidden_size, rows),
            numbers(ones),
            numbers(ones),
            matrix(wide, c.hidden_size, depth),
        )

    def delta_net() -> DeltaNet:
        wide = c.delta_value_heads * c.delta_value_dim
        return DeltaNet(
            matrix(c.hidden_size, c.channels + wide + 2 * c.delta_value_heads),
            matrix(c.kernel, c.channels),
            # From heads that forget within a few tokens to those that remember hundreds.
            numbers(-np.geomspace(0.005, 0.5, c.delta_value_heads)),
            numbers(np.zeros(c.delta_value_heads)),
            numbers(np.ones(c.delta_value_dim)),
            matrix(wide, c.hidden_size, depth),
        )

    def norm() -> NativeArray:
        return numbers(np.ones(c.hidden_size))

    def layer(recurrent: bool) -> Layer:
        mlp = MLP(
            matrix(c.hidden_size, 2 * c.intermediate_size),
            matrix(c.intermediate_size, c.hidden_size, depth),
        )
        return Layer(norm(), delta_net() if recurrent else attention(), norm(), mlp)

    embedding = matrix(c.hidden_size, c.vocab_size)
    head = embedding if c.tied else matrix(c.hidden_size, c.vocab_size)
    return Weights(embedding, tuple(map(layer, c.recurrent)), norm(), head)


def _examples(turns: Iterator[Pair], tokenizer: Tokenizer) -> tuple[HostArray, HostArray]:
    """Draw conversations: ids, int64 [BATCH, LENGTH + 1], and True for those that are learned.

    Answers and their end tokens are learned, not the questions.
    """
    rows, masks = [], []
    for _ in range(BATCH):
        ids: list[int] = []
        learned: list[bool] = []
        for question, answer in conversation(turns, LENGTH):
            for text, is_answer in (
                (f"<|user|>{question}{END}<|assistant|>", False),
                (f"{answer}{END}", True),
            ):
                encoded = tokenizer.encode(text, special=True)
                ids += encoded
                learned += [is_answer] * len(encoded)
        rows.append(ids[: LENGTH + 1])
        masks.append(learned[: LENGTH + 1])
    return np.array(rows), np.array(masks)


def _loss(model: Hybrid, ids: HostArray, learned: HostArray) -> NativeArray:
    """Return the mean cross-entropy of the learned tokens, in nats: a scalar."""
    logits: NativeArray = model(ids[:, :-1], last_only=False)
    wanted = torch.from_numpy(np.where(learned[:, 1:], ids[:, 1:], -100))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def _learning_rate(done: int, steps: int) -> float:
    """Return the rate of a step: it rises for a few, then falls to nothing along a cosine."""
    # Warmed up, because AdamW's estimates are poor in the first steps.
    falling = 0.5 + 0.5 * math.cos(math.pi * done / steps)
    return LEARNING_RATE * min(1.0, (done + 1) / WARMUP) * falling


def _keep_decaying(weights: Weights) -> None:
    with torch.no_grad():
        for layer in weights.layers:
            if isinstance(layer.mixer, DeltaNet):
                log_decay: NativeArray = layer.mixer.log_decay
                log_decay.clamp_(max=SLOWEST_DECAY)


def _arrays(weights: object) -> Iterator[NativeArray]:
    """Yield every array in a tuple of arrays and tuples."""
    if not isinstance(weights, tuple):
        yield weights
        return
    for part in weights:
        yield from _arrays(part)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a model and write it to a directory; the command of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m kvcache.reference.hybrid.train",
        description="Train a small hybrid (gated delta nets and attention) to chat with: it learns "
        "the docstrings of Python's builtins by heart.",
        epilog="Then: kvcache chat --model DIRECTORY",
    )
    parser.add_argument(
        "directory", type=Path, help="where the model goes, in files of transformers"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="of training (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another one gives another model")
    given = parser.parse_args(arguments)
    started = time.perf_counter()

    def show(done: int, steps: int, loss: float) -> None:
        if done % 20 == 0 or done == steps:
            seconds = time.perf_counter() - started
            _say(f"step {done} of {steps}, {seconds:.0f} s: {loss:.2f} nats per character")

    try:
        # A bad path raises now, and not at the end.
        given.directory.mkdir(parents=True, exist_ok=True)
        model = train(steps=given.steps, seed=given.seed, progress=show)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    algorithm = byte_tokenizer(SPECIAL)
    save_checkpoint(
        given.directory,
        SETTINGS,
        model.weights,
        model.backend,
        algorithm,
        template=TEMPLATE,
        end=END,
    )
    tokenizer = Tokenizer(algorithm, eos_id=algorithm.token_to_id(END), template=TEMPLATE)
    for question in ("len", "str.join", "zen 3"):
        ids = tokenizer.apply_chat(question)
        answer = generate(model, ids, model.make_caches(), 100, eos_id=tokenizer.eos_id)
        _say(f"you> {question}\n{tokenizer.decode(answer)}")
    _say(f"Talk to it: kvcache chat --model {given.directory}")


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
