"""Writes the checkpoint beside it: a tiny random GPT-2 under the names of the original code, saved by TensorFlow.

Run once with tensorflow-cpu 2.21 (`python make_checkpoint.py`), from an environment of its own; no test runs it. The
logits in expected.npz are TensorFlow's own, of the model as the original code defines it.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf  # type: ignore

HPARAMS = {"n_vocab": 64, "n_ctx": 32, "n_embd": 16, "n_head": 2, "n_layer": 2}
TOKENS = [3, 17, 60, 0, 5, 41, 41, 8, 22, 63, 1, 30]


def variables() -> dict[str, Any]:
    """Every variable, drawn so that each of them matters."""
    d, random = HPARAMS["n_embd"], np.random.RandomState(20)
    shapes: dict[str, tuple[int, ...]] = {"model/wte": (HPARAMS["n_vocab"], d), "model/wpe": (HPARAMS["n_ctx"], d)}
    for layer in range(HPARAMS["n_layer"]):
        for name, n_in, n_out in (
            ("attn/c_attn", d, 3 * d), ("attn/c_proj", d, d), ("mlp/c_fc", d, 4 * d), ("mlp/c_proj", 4 * d, d),
        ):  # fmt: skip
            shapes[f"model/h{layer}/{name}/w"] = (1, n_in, n_out)
            shapes[f"model/h{layer}/{name}/b"] = (n_out,)
        for name in ("ln_1", "ln_2"):
            shapes |= {f"model/h{layer}/{name}/g": (d,), f"model/h{layer}/{name}/b": (d,)}
    shapes |= {"model/ln_f/g": (d,), "model/ln_f/b": (d,)}
    values = {name: 0.3 * random.standard_normal(shape) + name.endswith("/g") for name, shape in shapes.items()}
    return {name: tf.Variable(value.astype(np.float32), name=name) for name, value in values.items()}


def linear(x: Any, v: dict[str, Any], name: str) -> Any:
    return tf.matmul(x, v[f"{name}/w"][0]) + v[f"{name}/b"]


def norm(x: Any, v: dict[str, Any], name: str) -> Any:
    centred = x - tf.reduce_mean(x, axis=-1, keepdims=True)
    variance = tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True)
    return centred * tf.math.rsqrt(variance + 1e-5) * v[f"{name}/g"] + v[f"{name}/b"]


def attention(x: Any, v: dict[str, Any], name: str) -> Any:
    length, heads = len(TOKENS), HPARAMS["n_head"]
    head_dim = HPARAMS["n_embd"] // heads
    q, k, v_ = (
        tf.transpose(tf.reshape(part, [length, heads, head_dim]), [1, 0, 2])
        for part in tf.split(linear(x, v, f"{name}/c_attn"), 3, axis=-1)
    )
    scores = tf.matmul(q, k, transpose_b=True) / math.sqrt(head_dim)
    visible = np.tril(np.ones((length, length), np.float32))
    weights = tf.nn.softmax(scores * visible - 1e10 * (1 - visible))
    merged = tf.reshape(tf.transpose(tf.matmul(weights, v_), [1, 0, 2]), [length, HPARAMS["n_embd"]])
    return linear(merged, v, f"{name}/c_proj")


def gelu(x: Any) -> Any:
    return 0.5 * x * (1 + tf.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * tf.pow(x, 3))))


def logits(v: dict[str, Any]) -> Any:
    x = tf.gather(v["model/wte"], TOKENS) + v["model/wpe"][: len(TOKENS)]
    for layer in range(HPARAMS["n_layer"]):
        name = f"model/h{layer}"
        x += attention(norm(x, v, f"{name}/ln_1"), v, f"{name}/attn")
        x += linear(gelu(linear(norm(x, v, f"{name}/ln_2"), v, f"{name}/mlp/c_fc")), v, f"{name}/mlp/c_proj")
    return tf.matmul(norm(x, v, "model/ln_f"), v["model/wte"], transpose_b=True)


def main() -> None:
    os.chdir(Path(__file__).parent)
    tf.disable_eager_execution()
    with tf.Session() as session:
        made = variables()
        session.run(tf.global_variables_initializer())
        tf.train.Saver(list(made.values())).save(session, "./model.ckpt", write_meta_graph=False)
        np.savez("expected.npz", tokens=np.array(TOKENS), logits=session.run(logits(made)))
    Path("hparams.json").write_text(json.dumps(HPARAMS) + "\n")


if __name__ == "__main__":
    main()
