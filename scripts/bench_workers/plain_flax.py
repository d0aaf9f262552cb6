"""The same work as Flax's own examples write it: nn.Conv, nn.max_pool, one jitted step a call.

No XLA flags, no rewritten operators; the data lies on the device and the step gathers it, as ours.
"""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from serve import START, WORKLOAD, serve


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        for features in (256, 128):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(10)(x)


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


class Airbench(nn.Module):
    """airbench's network for 94 %: a stem that is not learnt but for its bias, three groups."""

    @nn.compact
    def __call__(self, x, train):
        init = nn.initializers.lecun_normal()
        key = self.make_rng("params") if self.is_initializing() else None
        stem = self.variable("frozen", "stem", lambda: init(key, (2, 2, 3, 24)))
        x = jax.lax.conv_general_dilated(
            x, stem.value, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = nn.gelu(x + self.param("stem_bias", nn.initializers.zeros, (24,)))
        for width in (64, 256, 256):
            for pool in (True, False):
                x = nn.Conv(width, (3, 3), use_bias=False)(x)
                if pool:
                    x = nn.max_pool(x, (2, 2), strides=(2, 2))
                norm = nn.BatchNorm(not train, momentum=0.6, epsilon=1e-12, use_scale=False)
                x = nn.gelu(norm(x))
        x = nn.max_pool(x, (3, 3), strides=(3, 3)).reshape(len(x), -1)
        return nn.Dense(10, use_bias=False)(x) / 256


class ResNet18(nn.Module):
    """With a stem of 3x3, for small images."""

    @nn.compact
    def __call__(self, x, train):
        def conv(features, size, stride):
            return nn.Conv(features, (size, size), (stride, stride), use_bias=False)

        def norm():
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)

        x = nn.relu(norm()(conv(64, 3, 1)(x)))
        for stage, width in enumerate((64, 128, 256, 512)):
            for block in range(2):
                stride = 2 if stage and not block else 1
                y = nn.relu(norm()(conv(width, 3, stride)(x)))
                y = norm()(conv(width, 3, 1)(y))
                if x.shape != y.shape:
                    x = norm()(conv(width, 1, stride)(x))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class GPT(nn.Module):
    vocabulary: int
    context: int
    layers: int
    heads: int
    width: int
    bias: bool
    decode: bool = False

    @nn.compact
    def __call__(self, tokens, train, at=0):
        embed = nn.Embed(self.vocabulary, self.width)
        x = embed(tokens) + nn.Embed(self.context, self.width)(at + jnp.arange(tokens.shape[1]))
        mask = None if self.decode else nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            y = nn.LayerNorm(use_bias=self.bias)(x)
            attention = nn.MultiHeadDotProductAttention(
                self.heads, use_bias=self.bias, decode=self.decode
            )
            x = x + attention(y, mask=mask)
            y = nn.LayerNorm(use_bias=self.bias)(x)
            y = nn.gelu(nn.Dense(4 * self.width, use_bias=self.bias)(y))
            x = x + nn.Dense(self.width, use_bias=self.bias)(y)
        return embed.attend(nn.LayerNorm(use_bias=self.bias)(x))


small = {"vocabulary": 65, "layers": 4, "heads": 4, "width": 128, "bias": False}
large = {"vocabulary": 50_257, "layers": 12, "heads": 12, "width": 768, "bias": True}
adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, 0.9, 0.99, weight_decay=0.1))
nesterov = optax.sgd(0.1, 0.85, nesterov=True)
# model, optimizer (none: forward and backward only), batch, shape of an example, steps in a row
WORKLOADS: dict[str, tuple[nn.Module, Any, int, tuple[int, ...], int]] = {
    "mlp": (MLP(), optax.adam(1e-3), 128, (28, 28, 1), 10),
    "lenet_4": (LeNet(), optax.sgd(0.001, 0.9), 4, (32, 32, 3), 50),
    "lenet_128": (LeNet(), optax.sgd(0.001, 0.9), 128, (32, 32, 3), 10),
    "airbench_16": (Airbench(), nesterov, 16, (32, 32, 3), 1),
    "airbench_256": (Airbench(), nesterov, 256, (32, 32, 3), 1),
    "airbench_2000": (Airbench(), nesterov, 2000, (32, 32, 3), 1),
    "resnet18": (ResNet18(), optax.sgd(0.1, 0.9), 64, (32, 32, 3), 1),
    "char_gpt": (GPT(context=64, **small), adamw, 12, (64,), 10),
    "generate": (GPT(context=256, decode=True, **small), None, 1, (256,), 250),
    "gpt2": (GPT(context=1024, **large), None, 1, (256,), 1),
}


def initial(model: nn.Module, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Parameters, and whatever else the model has."""
    one = jnp.zeros((1, *shape), int if len(shape) == 1 else float)
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), one, False)
    return variables["params"], {k: v for k, v in variables.items() if k != "params"}


def training(model, tx, batch, shape, steps, params, rest):
    noise = np.random.default_rng(0)
    text = len(shape) == 1
    if text:
        data_x = jnp.asarray(noise.integers(0, model.vocabulary, 500_000))
    else:
        data_x = jnp.asarray(noise.integers(0, 256, (10_000, *shape), np.uint8))
    data_y = jnp.asarray(noise.integers(0, 10, 10_000))
    order, step = noise.permutation(10_000), 0
    opt_state = tx.init(params) if tx else None

    @jax.jit
    def train_step(params, rest, opt_state, index):
        if text:
            window = data_x[index[:, None] + jnp.arange(shape[0] + 1)]
            x, y = window[:, :-1], window[:, 1:]
        else:
            x, y = (data_x[index].astype(jnp.float32) / 255 - 0.5) / 0.5, data_y[index]

        def loss_fn(params):
            logits, new = model.apply({"params": params, **rest}, x, True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        if tx is None:
            return params, rest, opt_state, grads
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), rest | new, opt_state, loss

    def train() -> float:
        nonlocal params, rest, opt_state, step
        for _ in range(steps):
            index = order[np.arange(step * batch, (step + 1) * batch) % len(order)]
            params, rest, opt_state, last = train_step(params, rest, opt_state, index)
            step += 1
        jax.block_until_ready(last)
        return steps * batch * (shape[0] if text else 1)

    return train


def generation(model, tokens, params, rest):
    """As the lm1b example decodes: a cache, and a while loop over tokens, all compiled."""

    @jax.jit
    def write(params, cache, key):
        def more(state):
            return state[0] < tokens

        def extend(state):
            at, token, cache, text = state
            variables = {"params": params, "cache": cache}
            logits, new = model.apply(variables, token[None, None], False, at, mutable=["cache"])
            token = jax.random.categorical(jax.random.fold_in(key, at), logits[0, 0] / 0.8)
            return at + 1, token, new["cache"], text.at[at].set(token)

        start = (jnp.int32(0), jnp.int32(0), cache, jnp.zeros(tokens, jnp.int32))
        return jax.lax.while_loop(more, extend, start)[-1]

    def text() -> float:
        write(params, rest["cache"], jax.random.key(0)).block_until_ready()
        return tokens

    return text


def main() -> None:
    model, tx, batch, shape, steps = WORKLOADS[WORKLOAD]
    params, rest = initial(model, shape)
    if WORKLOAD == "generate":
        work = generation(model, steps, params, rest)
    else:
        work = training(model, tx, batch, shape, 1 if START else steps, params, rest)
    parameters = sum(a.size for a in jax.tree.leaves(params))
    serve(work, parameters, JAX=jax.__version__, Flax=flax.__version__)


if __name__ == "__main__":
    main()
