"""oneDNN's operations against XLA's and numpy's in float64."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeco import onednn
from jaxeco.errors import UserError

pytestmark = pytest.mark.skipif(
    onednn.version() is None, reason="needs the library: pip install 'jaxeco[cpu]' on x86-64 Linux"
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def in_float64(function, *arguments, dy):
    """Result and gradients; the arguments are rounded to float32 first, as the others see them."""
    with jax.enable_x64(True):
        y, back = jax.vjp(function, *(jnp.asarray(a, jnp.float64) for a in arguments))
        return [np.asarray(a) for a in (y, *back(jnp.asarray(dy, jnp.float64)))]


def by_onednn(function, *arguments, dy):
    y, back = jax.vjp(jax.jit(function), *map(jnp.asarray, arguments))
    return [np.asarray(a, np.float64) for a in (y, *back(jnp.asarray(dy)))]


def near(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def reference(stride, pads):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return convolve


@pytest.mark.parametrize(
    ("x", "kernel", "stride", "pads"),
    [
        ((2, 9, 8, 16), (3, 3, 16, 24), 1, ((1, 1), (1, 1))),
        ((3, 10, 13, 5), (5, 4, 5, 7), 2, ((2, 0), (1, 3))),  # the last row is never reached
        ((2, 7, 7, 8), (3, 3, 8, 4), 1, ((1, 0), (1, 0))),
        ((1, 4, 4, 1), (4, 4, 1, 1), 1, ((0, 0), (0, 0))),
    ],
)
def test_a_convolution_and_its_gradients(x, kernel, stride, pads):
    x, kernel = (normal(n, *shape).astype(np.float32) for n, shape in enumerate((x, kernel)))
    dy = normal(2, *reference(stride, pads)(x, kernel).shape).astype(np.float32)
    expected = in_float64(reference(stride, pads), x, kernel, dy=dy)

    def convolve(x, kernel):
        return onednn.convolve(x, kernel, stride, pads)

    near(by_onednn(convolve, x, kernel, dy=dy), expected, 1e-6)


def test_in_bfloat16_a_convolution_rounds_its_result_only():
    x, kernel, dy = (
        np.asarray(jnp.asarray(normal(n, *shape), jnp.bfloat16).astype(jnp.float32))
        for n, shape in enumerate([(2, 6, 6, 32), (3, 3, 32, 16), (2, 6, 6, 16)])
    )
    expected = in_float64(reference(1, ((1, 1), (1, 1))), x, kernel, dy=dy)
    got = by_onednn(
        lambda x, kernel: onednn.convolve(x, kernel, 1, ((1, 1), (1, 1))),
        *(jnp.asarray(a, jnp.bfloat16) for a in (x, kernel)),
        dy=jnp.asarray(dy, jnp.bfloat16),
    )
    for a, b in zip(got, expected, strict=True):  # half a unit of the eighth bit, and a rounding
        np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("spec", "a", "b"),
    [
        ("nc,cf->nf", (7, 5), (5, 9)),
        ("bthk,bshk->bhts", (2, 5, 3, 4), (2, 6, 3, 4)),
        ("bhts,bshk->bthk", (2, 3, 5, 6), (2, 6, 3, 4)),
        ("km,nk->nm", (5, 1), (3, 5)),
    ],
)
def test_a_product_and_its_gradients(spec, a, b):
    a, b = (normal(n, *shape).astype(np.float32) for n, shape in enumerate((a, b)))
    dy = normal(2, *np.einsum(spec, a, b).shape).astype(np.float32)
    expected = in_float64(lambda a, b: jnp.einsum(spec, a, b), a, b, dy=dy)
    near(by_onednn(lambda a, b: onednn.einsum(spec, a, b), a, b, dy=dy), expected, 1e-6)


@pytest.mark.parametrize("shape", [(4, 3, 5, 8), (50, 6)])
def test_batch_norm_and_its_gradients(shape):
    x, dy = (3 * normal(n, *shape).astype(np.float32) + n for n in (1, 2))
    scale, shift = (1 + 0.1 * normal(n, shape[-1]).astype(np.float32) for n in (3, 4))
    axes = tuple(range(len(shape) - 1))

    def norm(x, scale, shift):
        centred = x - x.mean(axes)
        return centred / jnp.sqrt(jnp.square(centred).mean(axes) + 1e-3) * scale + shift

    expected = in_float64(norm, x, scale, shift, dy=dy)
    got = by_onednn(lambda *a: onednn.batch_norm(*a, 1e-3)[0], x, scale, shift, dy=dy)
    near(got, expected, 1e-5)
    _, mean, var = onednn.batch_norm(x, scale, shift, 1e-3)
    np.testing.assert_allclose(mean, x.mean(axes), rtol=1e-5)
    np.testing.assert_allclose(var, x.var(axes), rtol=1e-4)


def test_under_vmap_each_is_computed_by_itself():
    a, b = normal(0, 3, 4, 5).astype(np.float32), normal(1, 3, 5, 6).astype(np.float32)
    got = jax.vmap(lambda a, b: onednn.einsum("nc,cf->nf", a, b))(a, b)
    np.testing.assert_allclose(got, a @ b, rtol=1e-5)


def test_it_is_for_one_device(monkeypatch):
    x = jnp.ones((2, 2))
    assert jax.device_count() == 8 and not onednn.usable(x)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert onednn.usable(x) and onednn.usable(x.astype(jnp.bfloat16))
    assert not onednn.usable(x.astype(jnp.float16))
    assert not onednn.usable(x, x.astype(jnp.bfloat16))


def test_what_fails_within_it_is_an_error_of_the_step():
    call = jax.ffi.ffi_call(onednn.TARGET, jax.ShapeDtypeStruct((2,), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="JSONDecodeError"):
        jax.block_until_ready(jax.jit(lambda x: call(x, about="nonsense"))(jnp.ones(2)))


STEPS = """
from jaxeco import runtime
runtime.configure()
import jax, jax.numpy as jnp, numpy as np, optax
from jaxeco import onednn
from jaxeco.models import CifarNet
net, x = CifarNet(width=8), np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
variables = net.init(jax.random.key(0), x, train=True)

@jax.jit
def step(params, stats):
    def loss(params):
        y, new = net.apply({"params": params, **stats}, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(y, jnp.arange(8)).mean(), new
    (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), new, value

for _ in range(2):
    stats, params = {"batch_stats": variables["batch_stats"]}, variables["params"]
    for _ in range(5):
        params, stats, value = step(params, stats)
        print(float(value).hex())
print(onednn.version())
"""


def test_a_network_trains_alike_with_it_and_without():
    def train(setting):
        environment = dict(
            os.environ, XLA_FLAGS="--xla_backend_optimization_level=0", JAXECO_ONEDNN=setting
        )
        run = subprocess.run(
            [sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        *losses, version = run.stdout.split()
        assert losses[:5] == losses[5:]  # to the bit
        return [float.fromhex(loss) for loss in losses[:5]], version

    (plain, off), (ours, on) = train("off"), train("on")
    assert off == "None" and on == onednn.version()
    assert plain != ours
    np.testing.assert_allclose(ours, plain, rtol=1e-5)


def test_a_layer_that_insists_says_where_it_is_from(monkeypatch):
    monkeypatch.setattr(onednn, "_library", lambda: None)
    with pytest.raises(UserError, match="pip install"):
        onednn.convolve(jnp.ones((1, 3, 3, 1)), jnp.ones((1, 1, 1, 1)), 1, ((0, 0), (0, 0)))
