"""The same training as Flax's own examples write it: nn.Conv, nn.max_pool, one jitted step a call.

No XLA flags, no rewritten operators; the data lies on the device and the step gathers it, as ours.
"""

import os
import sys

os.environ["XLA_FLAGS"] = ""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from serve import serve


class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features in (6, 16):
            x = nn.Conv(features, (5, 5), padding="VALID")(x)
            x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        for features in (120, 84):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(10)(x)


class CifarNet(nn.Module):
    """The network of experiments/cifar_cnn.py."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.gelu(nn.Conv(32, (4, 4), (2, 2), padding=1)(x))
        for width, pool in ((64, True), (128, True), (128, False)):
            for first in (True, False):
                x = nn.Conv(width, (3, 3), use_bias=False)(x)
                if first and pool:
                    x = nn.max_pool(x, (2, 2), strides=(2, 2))
                norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, use_scale=False)
                x = nn.gelu(norm(x))
        return nn.Dense(10, use_bias=False)(x.max((1, 2)))


class GPT(nn.Module):
    """The network of experiments/shakespeare_char.py."""

    @nn.compact
    def __call__(self, tokens, train):
        embed, mask = nn.Embed(65, 128), nn.make_causal_mask(tokens)
        x = embed(tokens) + nn.Embed(64, 128)(jnp.arange(64))
        for _ in range(4):
            y = nn.LayerNorm(use_bias=False)(x)
            y = nn.MultiHeadDotProductAttention(4, use_bias=False)(y, mask=mask)
            x = x + y
            y = nn.LayerNorm(use_bias=False)(x)
            y = nn.Dense(128, use_bias=False)(nn.gelu(nn.Dense(512, use_bias=False)(y)))
            x = x + y
        return embed.attend(nn.LayerNorm(use_bias=False)(x))


adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, 0.9, 0.99, weight_decay=0.1))
# model, optimizer, batch, steps between two waits
WORKLOADS = {
    "lenet": (LeNet(), optax.sgd(0.001, 0.9), 4, 50),
    "cifar_cnn": (CifarNet(), optax.sgd(0.1, 0.9, nesterov=True), 500, 1),
    "char_gpt": (GPT(), adamw, 12, 10),
}


def main(workload: str) -> None:
    model, tx, batch, steps = WORKLOADS[workload]
    noise = np.random.default_rng(0)
    text = workload == "char_gpt"
    if text:
        data_x = jnp.asarray(noise.integers(0, 65, 1_000_000))
    else:
        data_x = jnp.asarray(noise.integers(0, 256, (10_000, 32, 32, 3)), jnp.uint8)
    data_y = jnp.asarray(noise.integers(0, 10, 10_000))
    one = jnp.zeros((1, 64), int) if text else jnp.zeros((1, 32, 32, 3))
    variables = model.init(jax.random.key(0), one, False)
    params, stats = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    opt_state, order, step = tx.init(params), noise.permutation(10_000), 0

    @jax.jit
    def train_step(params, stats, opt_state, index):
        if text:
            window = data_x[index[:, None] + jnp.arange(65)]
            x, y = window[:, :-1], window[:, 1:]
        else:
            x, y = (data_x[index].astype(jnp.float32) / 255 - 0.5) / 0.5, data_y[index]

        def loss_fn(params):
            logits, new = model.apply({"params": params, **stats}, x, True, mutable=list(stats))
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        (loss, stats_), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state_ = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats_, opt_state_, loss

    def train() -> int:
        nonlocal params, stats, opt_state, step
        for _ in range(steps):
            index = order[np.arange(step * batch, (step + 1) * batch) % len(order)]
            params, stats, opt_state, loss = train_step(params, stats, opt_state, index)
            step += 1
        loss.block_until_ready()
        return steps * batch * (64 if text else 1)

    serve(f"plain Flax (JAX {jax.__version__})", train)


main(sys.argv[1])
