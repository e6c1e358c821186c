"""A hybrid decoder in float64, token by token and head by head; it shares nothing with the model.

It reads a checkpoint by the names of its tensors, and keeps all tokens as its only memory.
"""

import json

import numpy as np
from safetensors.numpy import load_file


class Oracle:
    """Logits of the checkpoint in a directory."""

    def __init__(self, path):
        self.c = json.loads((path / "config.json").read_text())
        tensors = load_file(path / "model.safetensors")
        self.w = {name: array.astype(np.float64) for name, array in tensors.items()}

    def logits(self, ids):
        """Token ids [L] -> logits [L, vocab]."""
        x = self.w["model.embed_tokens.weight"][ids]
        for i in range(self.c["num_hidden_layers"]):
            at = f"model.layers.{i}."
            h = self.norm(x, 1 + self.w[f"{at}input_layernorm.weight"])
            recurrent = f"{at}linear_attn.A_log" in self.w
            mixer = self.delta_net if recurrent else self.attention
            x = x + mixer(h, f"{at}linear_attn." if recurrent else f"{at}self_attn.")
            h = self.norm(x, 1 + self.w[f"{at}post_attention_layernorm.weight"])
            x = x + np.array([self.mlp(token, f"{at}mlp.") for token in h])
        tied = self.c["tie_word_embeddings"]
        head = self.w["model.embed_tokens.weight" if tied else "lm_head.weight"]
        return self.norm(x, 1 + self.w["model.norm.weight"]) @ head.T

    def greedy(self, ids, count):
        """The most likely next tokens after `ids`, `count` of them."""
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[-count:]

    def norm(self, x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.c["rms_norm_eps"]) * weight

    def attention(self, h, at):
        c, dim, length = self.c, self.c["head_dim"], len(h)
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        both = (h @ self.w[f"{at}q_proj.weight"].T).reshape(length, heads, 2, dim)
        k = (h @ self.w[f"{at}k_proj.weight"].T).reshape(length, kv_heads, dim)
        v = (h @ self.w[f"{at}v_proj.weight"].T).reshape(length, kv_heads, dim)
        q = self.rotated(self.norm(both[:, :, 0], 1 + self.w[f"{at}q_norm.weight"]))
        k = self.rotated(self.norm(k, 1 + self.w[f"{at}k_norm.weight"]))
        out = np.zeros((length, heads, dim))
        for t in range(length):
            for head in range(heads):
                shared = head // (heads // kv_heads)
                scores = k[: t + 1, shared] @ q[t, head] / dim**0.5
                weights = np.exp(scores - scores.max())
                attended = weights / weights.sum() @ v[: t + 1, shared]
                out[t, head] = attended * sigmoid(both[t, head, 1])
        return out.reshape(length, -1) @ self.w[f"{at}o_proj.weight"].T

    def rotated(self, x):
        """Rotates pairs of the first dimensions, as complex numbers."""
        half = int(self.c["head_dim"] * self.c["partial_rotary_factor"]) // 2
        freqs = self.c["rope_theta"] ** -(np.arange(half) / half)
        turn = np.exp(1j * np.outer(np.arange(len(x)), freqs))[:, None, :]
        turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn
        return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], -1)

    def delta_net(self, h, at):
        c = self.c
        key_heads, heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
        dk, dv, kernel = (
            c["linear_key_head_dim"],
            c["linear_value_head_dim"],
            c["linear_conv_kernel_dim"],
        )
        group = heads // key_heads
        conv, wide = self.w[f"{at}conv1d.weight"][:, 0], key_heads * dk
        rows = (h @ self.w[f"{at}in_proj_qkvz.weight"].T).reshape(len(h), key_heads, -1)
        ba = (h @ self.w[f"{at}in_proj_ba.weight"].T).reshape(len(h), key_heads, -1)
        gates = rows[:, :, 2 * dk + group * dv :].reshape(len(h), heads, dv)
        inputs = np.concatenate(
            [
                rows[:, :, :dk].reshape(len(h), -1),
                rows[:, :, dk : 2 * dk].reshape(len(h), -1),
                rows[:, :, 2 * dk : 2 * dk + group * dv].reshape(len(h), -1),
            ],
            -1,
        )
        inputs = np.concatenate([np.zeros((kernel - 1, inputs.shape[1])), inputs])
        matrices, out = np.zeros((heads, dk, dv)), np.zeros((len(h), heads, dv))
        for t in range(len(h)):
            mixed = sum(inputs[t + j] * conv[:, j] for j in range(kernel))
            mixed = mixed * sigmoid(mixed)
            for head in range(heads):
                shared = head // group
                q = mixed[shared * dk :][:dk]
                k = mixed[wide + shared * dk :][:dk]
                v = mixed[2 * wide + head * dv :][:dv]
                q = q / np.sqrt(q @ q + 1e-6) / dk**0.5
                k = k / np.sqrt(k @ k + 1e-6)
                beta = sigmoid(ba[t, shared, head % group])
                a = ba[t, shared, group + head % group] + self.w[f"{at}dt_bias"][head]
                decay = np.exp(-np.exp(self.w[f"{at}A_log"][head]) * np.log1p(np.exp(a)))
                matrices[head] *= decay
                matrices[head] += np.outer(k, beta * (v - k @ matrices[head]))
                z = gates[t, head]
                normed = self.norm(q @ matrices[head], self.w[f"{at}norm.weight"])
                out[t, head] = normed * z * sigmoid(z)
        return out.reshape(len(h), -1) @ self.w[f"{at}out_proj.weight"].T

    def mlp(self, token, at):
        """The MLP of one token: the dense one, or its experts and the shared one."""
        if f"{at}gate.weight" not in self.w:
            return self.gated(token, at)
        scores = np.exp(self.w[f"{at}gate.weight"] @ token)
        scores /= scores.sum()
        best = np.argsort(scores)[::-1][: self.c["num_experts_per_tok"]]
        total = scores[best].sum() if self.c["norm_topk_prob"] else 1
        out = sum(scores[e] / total * self.gated(token, f"{at}experts.{e}.") for e in best)
        gate = sigmoid(self.w[f"{at}shared_expert_gate.weight"][0] @ token)
        return out + gate * self.gated(token, f"{at}shared_expert.")

    def gated(self, token, at):
        gate = self.w[f"{at}gate_proj.weight"] @ token
        up = self.w[f"{at}up_proj.weight"] @ token
        return self.w[f"{at}down_proj.weight"] @ (gate * sigmoid(gate) * up)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))
