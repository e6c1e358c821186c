"""A tiny Whisper with random weights, and a slow model of it that shares no code with ours.

Its vocabulary is as long as the real one, of which it may say nine words and the end: windows end
at different times, and others take their place in the cache.
"""

import math

import numpy as np

from kvcache.reference.whisper.mel import log_mel

HIDDEN, HEADS, LAYERS, POSITIONS, VOCAB = 16, 2, 2, 12, 50259
END, START, UNTIMED = 50256, 50257, 50258
WORDS = {3, 14, 159, 265, 358, 979, 3238, 46264, 33832}
NEVER_FIRST = [END, 14]


def tiny_arrays(seed=3):
    """Random variables of a model by their names in a file, so large that it is talkative."""
    rng = np.random.default_rng(seed)
    arrays = {}

    def linear(name, outputs, *inputs, gain=1.0):
        scale = gain * math.prod(inputs) ** -0.5
        arrays[f"{name}/weight"] = rng.normal(scale=scale, size=(outputs, *inputs))
        arrays[f"{name}/bias"] = rng.normal(scale=0.1, size=outputs)

    def norm(name):
        arrays[f"{name}/layer_norm/gamma"] = 1 + rng.normal(scale=0.1, size=HIDDEN)
        arrays[f"{name}/layer_norm/beta"] = rng.normal(scale=0.1, size=HIDDEN)

    def part(name, *outputs):
        norm(name)
        for i, width in enumerate(outputs):
            inputs = 4 * HIDDEN if name.endswith("ffn") and i == 1 else HIDDEN
            linear(f"{name}/linear_{i}", width, inputs, gain=4.0)

    linear("encoder/conv1", HIDDEN, 80, 3)
    linear("encoder/conv2", HIDDEN, HIDDEN, 3)
    for half, places in (("encoder", 1500), ("decoder", POSITIONS)):
        arrays[f"{half}/position_encodings/encodings"] = rng.normal(size=(places, HIDDEN))
        for i in range(LAYERS):
            part(f"{half}/layer_{i}/self_attention", 3 * HIDDEN, HIDDEN)
            if half == "decoder":
                part(f"{half}/layer_{i}/attention", HIDDEN, 2 * HIDDEN, HIDDEN)
            part(f"{half}/layer_{i}/ffn", 4 * HIDDEN, HIDDEN)
        norm(half)
    arrays["decoder/embeddings/weight"] = rng.normal(scale=0.3, size=(VOCAB, HIDDEN))
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    heads = np.array(HEADS, np.int16)
    return halves | {"encoder/num_heads": heads, "decoder/num_heads": heads}


class Oracle:
    """A model in float64 that keeps nothing: every token is computed from all before it."""

    def __init__(self, arrays):
        self.w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def linear(self, name, x):
        return x @ self.w[f"{name}/weight"].T + self.w[f"{name}/bias"]

    def norm(self, name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * self.w[f"{name}/layer_norm/gamma"] + self.w[f"{name}/layer_norm/beta"]

    def convolve(self, name, x, step):
        padded = np.pad(x, ((1, 1), (0, 0)))
        weight = self.w[f"{name}/weight"]
        taps = sum(padded[i : i + len(x)] @ weight[:, :, i].T for i in range(3))
        return gelu(taps + self.w[f"{name}/bias"])[::step]

    def attend(self, q, k, v, causal):
        out, size = [], HIDDEN // HEADS
        for at in range(0, HIDDEN, size):
            head = slice(at, at + size)
            scores = q[:, head] @ k[:, head].T / size**0.5
            if causal:
                scores = np.where(np.tri(*scores.shape, dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(weights / weights.sum(-1, keepdims=True) @ v[:, head])
        return np.concatenate(out, -1)

    def look_back(self, name, x, causal):
        q, k, v = np.split(self.linear(f"{name}/linear_0", self.norm(name, x)), 3, axis=-1)
        return x + self.linear(f"{name}/linear_1", self.attend(q, k, v, causal))

    def look_across(self, name, x, sound):
        q = self.linear(f"{name}/linear_0", self.norm(name, x))
        k, v = np.split(self.linear(f"{name}/linear_1", sound), 2, axis=-1)
        return x + self.linear(f"{name}/linear_2", self.attend(q, k, v, causal=False))

    def feed_forward(self, name, x):
        wide = gelu(self.linear(f"{name}/linear_0", self.norm(name, x)))
        return x + self.linear(f"{name}/linear_1", wide)

    def listen(self, mel):
        x = self.convolve("encoder/conv2", self.convolve("encoder/conv1", mel, 1), 2)
        x = x + self.w["encoder/position_encodings/encodings"]
        for i in range(LAYERS):
            x = self.look_back(f"encoder/layer_{i}/self_attention", x, causal=False)
            x = self.feed_forward(f"encoder/layer_{i}/ffn", x)
        return self.norm("encoder", x)

    def logits(self, ids, sound):
        x = self.w["decoder/embeddings/weight"][ids]
        x = x + self.w["decoder/position_encodings/encodings"][: len(ids)]
        for i in range(LAYERS):
            x = self.look_back(f"decoder/layer_{i}/self_attention", x, causal=True)
            x = self.look_across(f"decoder/layer_{i}/attention", x, sound)
            x = self.feed_forward(f"decoder/layer_{i}/ffn", x)
        return self.norm("decoder", x[-1:])[0] @ self.w["decoder/embeddings/weight"].T

    def text(self, samples):
        sound, ids = self.listen(log_mel(samples).astype(np.float64)), [START, UNTIMED]
        while ids[-1] != END and len(ids) < POSITIONS:
            logits = self.logits(ids, sound)
            allowed = WORDS | {END} if len(ids) > 2 else WORDS - {*NEVER_FIRST}
            ids.append(max(allowed, key=lambda token: logits[token]))
        return [f"w{token}" for token in ids[2:] if token != END]


@np.vectorize
def gelu(x):
    return x * (1 + math.erf(x / 2**0.5)) / 2


def steps(window):
    """Tokens that a window takes, its end included if there was room for it."""
    return min(len(window) + 1, POSITIONS - 2)


def joined(windows):
    return " ".join(word for window in windows for word in window)
