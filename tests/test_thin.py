"""Convolution and pooling over blocks: against XLA's own in float64, and as LeNet trains by it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeco import models
from jaxeco.models import thin
from jaxeco.models.layers import activate


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def plain(x, layers, activation):
    """The same by XLA's convolution and reduce-window, in the dtype of x."""
    for kernel, bias in layers:
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = activate(activation, x + bias)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x


@pytest.mark.parametrize(
    ("examples", "height", "width", "size", "activation"),
    [
        (3, 16, 20, 5, "relu"),
        (16, 16, 16, 5, "tanh"),  # in two groups
        (2, 10, 14, 3, "gelu"),
    ],
)
def test_values_and_gradients_are_those_of_float64(examples, height, width, size, activation):
    x = normal(0, examples, height, width, 2)
    layers = [
        (normal(1, size, size, 2, 3) / size, normal(2, 3)),
        (normal(3, size, size, 3, 4) / size, normal(4, 4)),
    ]
    assert thin.fits(height, width, (size, size))

    def both(convolve, dtype):
        args = jax.tree.map(lambda a: jnp.asarray(a, dtype), (x, layers))
        y, back = jax.vjp(lambda x, layers: convolve(x, layers, activation), *args)
        return y, back(jnp.asarray(normal(5, *y.shape), dtype))

    with jax.enable_x64(True):
        expected = jax.jit(lambda: both(plain, jnp.float64))()
    actual = jax.jit(lambda: both(thin.convolve_and_pool, jnp.float32))()
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32 and e.dtype == jnp.float64
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * np.abs(e).max())


@pytest.mark.parametrize(
    ("height", "width", "sizes", "answer"),
    [
        (32, 32, (5, 5), True),
        (28, 16, (5, 5), True),
        (30, 32, (5, 5), False),  # 13 after the first pooling
        (8, 8, (5, 5), False),
        (32, 32, (4,), False),
    ],
)
def test_fits(height, width, sizes, answer):
    assert thin.fits(height, width, sizes) is answer


def losses(conv, steps=20):
    model, tx = models.LeNet(conv=conv), optax.sgd(0.01, 0.9)
    x = jnp.asarray(normal(6, steps, 4, 32, 32, 3), jnp.float32)
    y = np.random.default_rng(7).integers(0, 10, (steps, 4))

    def step(state, batch):
        def loss(params):
            logits = model.apply({"params": params}, batch[0], train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        value, grads = jax.value_and_grad(loss)(state[0])
        updates, opt_state = tx.update(grads, state[1])
        return (optax.apply_updates(state[0], updates), opt_state), value

    params = model.init(jax.random.key(0), x[0], train=False)["params"]
    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), (x, y))[1])()


def test_lenet_begins_and_learns_as_by_xla():
    np.testing.assert_allclose(losses("blocks"), losses("xla"), rtol=1e-5)


def program(model, side):
    x = jnp.zeros((4, side, side, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    return str(jax.make_jaxpr(lambda params: model.apply(params, x, train=False))(params))


@pytest.mark.parametrize(("side", "conv"), [(32, "blocks"), (30, "matmul")])
def test_lenet_chooses_by_shape(side, conv):
    assert program(models.LeNet(), side) == program(models.LeNet(conv=conv), side)
    assert program(models.LeNet(), side) != program(models.LeNet(conv="xla"), side)


def test_blocks_where_they_do_not_fit():
    with pytest.raises(ValueError, match="'blocks' does not fit an image of 30x30: expected sides"):
        program(models.LeNet(conv="blocks"), 30)
