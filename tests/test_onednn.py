"""oneDNN's operations against XLA's and numpy's in float64; huge pages."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeco import data, onednn
from jaxeco.config import load
from jaxeco.errors import UserError
from jaxeco.forward import forward
from jaxeco.models import BatchNorm, LanguageModel, Transformer
from jaxeco.plan import plan
from jaxeco.session import flops

ROOT = Path(__file__).parent.parent

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


def test_a_product_and_its_gradients():
    spec, a, b = "nc,cf->nf", normal(0, 7, 5).astype(np.float32), normal(1, 5, 9).astype(np.float32)
    dy = normal(2, *np.einsum(spec, a, b).shape).astype(np.float32)
    expected = in_float64(lambda a, b: jnp.einsum(spec, a, b), a, b, dy=dy)
    near(by_onednn(lambda a, b: onednn.einsum(spec, a, b), a, b, dy=dy), expected, 1e-6)


@pytest.mark.parametrize(
    ("spec", "a", "b"),
    [
        ("bthk,bshk->bhts", (2, 5, 3, 4), (2, 6, 3, 4)),
        ("bhts,bshk->bthk", (2, 3, 5, 6), (2, 6, 3, 4)),
    ],
)
def test_products_side_by_side(spec, a, b):
    a, b = (normal(n, *shape).astype(np.float32) for n, shape in enumerate((a, b)))
    expected = np.einsum(spec, a.astype(np.float64), b)
    np.testing.assert_allclose(onednn.einsum(spec, a, b), expected, rtol=0, atol=1e-5)


def test_what_it_has_only_plain_loops_for_is_left_to_xla(one_device):
    a, b = jnp.ones((2, 3, 5, 4)), jnp.ones((2, 3, 6, 4))
    assert onednn.multiplies("bgmk,bgsk->bgms", a, b, gradients=False)
    assert not onednn.multiplies("bgmk,bgsk->bgms", a, b)  # b's gradient transposes
    with pytest.raises(jax.errors.JaxRuntimeError, match="plain loops"):
        jax.block_until_ready(onednn.einsum("bgmk,bgms->bgsk", a, jnp.ones((2, 3, 5, 6))))


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


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_it_is_for_several_devices_no_more():
    assert jax.device_count() == 8 and not onednn.usable(jnp.ones((2, 2)))


def test_what_it_is_for(one_device):
    x = jnp.ones((2, 2))
    assert onednn.usable(x) and onednn.usable(x.astype(jnp.bfloat16))
    assert not onednn.usable(x.astype(jnp.float16))
    assert not onednn.usable(x, x.astype(jnp.bfloat16))
    assert not onednn.usable(x[:0])
    with onednn.left_out():
        assert not onednn.usable(x)
    assert onednn.usable(x)


def test_running_averages_of_batch_norm(one_device):
    x = 3 * normal(0, 16, 3, 3, 8).astype(np.float32) + 1
    for dtype in (jnp.float32, jnp.bfloat16):
        norm = BatchNorm(momentum=0.75)
        with onednn.left_out():
            variables = norm.init(jax.random.key(0), x, train=True)
            expected, plain = norm.apply(variables, x, train=True, mutable=["batch_stats"])
        y, new = norm.apply(variables, x.astype(dtype), train=True, mutable=["batch_stats"])
        assert y.dtype == dtype
        assert jax.tree.structure(new) == jax.tree.structure(plain)
        tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(y.astype(np.float32), expected, atol=tolerance, rtol=tolerance)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance)
        assert new["batch_stats"]["mean"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_language_model_with_it_and_without(one_device, dtype):
    model = LanguageModel(Transformer(vocab_size=11, context=16, layers=1, heads=2, width=32))
    tokens = np.arange(48).reshape(3, 16) * 7 % 11
    params = model.init(jax.random.key(0), tokens, train=False)["params"]

    def loss(params):
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        return jnp.square(model.apply({"params": params}, tokens, train=False)).mean()

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    assert onednn.TARGET in text
    ours = jax.grad(loss)(params)
    with onednn.left_out():
        plain = jax.grad(loss)(params)
    largest = max(float(jnp.abs(p).max()) for p in jax.tree.leaves(plain))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest)


def test_flops_are_counted_with_it_as_without(one_device):
    ex = load(ROOT / "experiments/cifar_cnn.py", ["batch=4", "width=8"]).experiment
    noise = normal(0, 8, 32, 32, 3).astype(np.float32)
    ex = replace(ex, train=data.Arrays(noise, np.arange(8) % 10), evals={}, best=None)
    p = plan(ex, jax.devices()[:1])
    counted = flops(p)
    # the two 3x3 filters of the middle group alone, forward and backward
    assert counted > 3 * 2 * 4 * (8 * 8 * 9 * 8 * 16 + 4 * 4 * 9 * 16 * 16)
    with onednn.left_out():
        assert flops(p) == counted


def test_in_bfloat16_the_whitening_stem_stays_float32(one_device):
    ex = load(ROOT / "experiments/cifar_speedrun.py", ["batch=4", "widths=8,8,8"]).experiment
    x = normal(0, 2, 32, 32, 3).astype(np.float32)
    variables = ex.model.init(jax.random.key(0), x, train=False)
    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    text = jax.jit(lambda params: forward(ex, params, stats, x, None)[0]).lower(params).as_text()
    assert re.search(r"dot_general.*tensor<.*x12xf32>, tensor<12x24xf32>", text)
    assert re.search(rf"{onednn.TARGET}.*tensor<3x3x24x8xbf16>", text)


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


def test_a_setting_that_means_nothing(monkeypatch):
    monkeypatch.setenv("JAXECO_ONEDNN", "0")
    with pytest.raises(UserError, match="JAXECO_ONEDNN=0: expected on or off"):
        onednn._library.__wrapped__()


def test_a_command_starts_itself_anew_with_huge_pages_once():
    said = "import os, sys; print(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:], os.getpid())"
    code = f"from jaxeco import runtime; runtime.restart_with_huge_pages(); {said}"
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-X", "utf8", "-c", code, "two words", "--x=1"]

    def run(**more):
        process = subprocess.Popen(
            command, env={**environment, **more}, stdout=subprocess.PIPE, text=True
        )
        return process.communicate()[0].split(maxsplit=1), process.pid

    (tunables, rest), pid = run()
    madvise = "[madvise]" in open("/sys/kernel/mm/transparent_hugepage/enabled").read()
    assert tunables == ("glibc.malloc.hugetlb=1" if madvise else "None")
    assert rest.split() == ["['two", "words',", "'--x=1']", str(pid)]
    assert run(GLIBC_TUNABLES="own")[0][0] == "own"


LEAVES = """
import sys
from jaxeco import runtime
runtime.configure()
import jax, jax.numpy as jnp
from jaxeco import onednn
x, k = jnp.ones((4, 16, 16, 32)), jnp.ones((3, 3, 32, 32)) / 300
assert onednn.usable(x)
conv = lambda i, x: onednn.convolve(x, k, 1, ((1, 1), (1, 1)))
many = jax.jit(lambda x: jax.lax.fori_loop(0, 300, conv, x)).lower(x).compile()
kept = many(x) if sys.argv[1] == "kept" else None
many(x)
raise SystemExit(3)
"""


@pytest.mark.parametrize("result", ["kept", "dropped"])
def test_a_process_that_ends_waits_for_what_is_in_flight(result):
    command = [sys.executable, "-c", LEAVES, result]
    run = subprocess.run(command, env=dict(os.environ, XLA_FLAGS=""), timeout=120)
    assert run.returncode == 3
