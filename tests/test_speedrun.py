"""What the CIFAR-10 speedrun is made of: whitening, frozen parts, alternating flips, views."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeco import config, data, models, optim, schedules
from jaxeco.data.pipeline import Feed, assemble
from jaxeco.errors import UserError
from jaxeco.experiment import Experiment
from jaxeco.forward import forward, viewed
from jaxeco.models.cifar import whitening
from jaxeco.plan import Plan, plan
from jaxeco.train import State, gradient
from jaxeco.trees import named

FILE = Path(__file__).parent.parent / "experiments" / "cifar_speedrun.py"
NOISE = np.random.default_rng(0)
X = NOISE.integers(0, 256, (48, 16, 16, 3)).astype(np.uint8)
X[:, ::2] = X[:, 1::2]  # neighbours that are alike
Y = NOISE.integers(0, 10, 48).astype(np.int32)


def experiment(*words: str, **changes: Any) -> Experiment:
    """The speedrun's, small, on images of noise; 3 steps an epoch."""
    ex = config.load(FILE, ["widths=4,6", "batch=16", "eval_batch=24", *words]).experiment
    test = data.Arrays(X[::-1].copy(), Y[::-1].copy())
    return replace(ex, train=data.Arrays(X, Y), evals={"test": test, "views": test}, **changes)


def linear(*words: str, **changes: Any) -> Plan:
    """With a model that compiles in no time."""
    model, optimizer = models.MLP((), num_classes=10), optim.SGD(0.1)
    return plan(experiment(*words, model=model, optimizer=optimizer, calibrate=None, **changes))


@pytest.fixture(scope="module")
def small() -> Plan:
    return plan(experiment(), jax.devices()[:1])


@pytest.fixture(scope="module")
def trained(small: Plan) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """The parameters before each of 12 steps, of 24, and the gradients there."""

    @jax.jit
    def step(state: State, batch: Any) -> tuple[State, Any]:
        return small.step(state, batch)[0], gradient(small.ex, state, batch)[2]

    state, found = small.start(), []
    with small.feed() as feed:
        for t in range(12):
            batch = assemble(feed.resident, jax.tree.map(lambda a: a[0], feed.fed(t)))
            after, grads = step(state, batch)
            found.append(jax.tree.map(np.asarray, (named(state.params), named(grads))))
            state = after
    return found


def patches(x_NxHxWxC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Every patch, as a row."""
    windows = np.lib.stride_tricks.sliding_window_view(x_NxHxWxC, (height, width), (1, 2))
    return np.moveaxis(windows, 3, -1).reshape(-1, height * width * x_NxHxWxC.shape[-1])


@pytest.mark.parametrize(("height", "width", "channels"), [(2, 2, 3), (3, 2, 1)])
def test_whitened_patches_have_unit_covariance(height: int, width: int, channels: int) -> None:
    mixed = NOISE.normal(size=(300, 9, 8, channels)) @ NOISE.normal(size=(channels, channels))
    x = (mixed + 0.5 * np.roll(mixed, 1, 2) + 0.3).astype(np.float32)
    eps = 5e-4
    kernel = whitening(x, height, width, eps)
    size = height * width * channels
    assert kernel.shape == (height, width, channels, 2 * size) and kernel.dtype == np.float32
    filters, negatives = np.split(kernel.reshape(size, -1).astype(np.float64), 2, axis=1)
    np.testing.assert_array_equal(filters, -negatives)
    rows = patches(x, height, width).astype(np.float64)
    white = rows @ filters
    eigenvalues = np.linalg.eigvalsh(rows.T @ rows / len(rows))
    expected = np.diag(eigenvalues / (eigenvalues + eps))
    np.testing.assert_allclose(white.T @ white / len(white), expected, atol=1e-5)


def test_a_run_starts_with_a_whitened_stem(small: Plan, trained: Any) -> None:
    first = np.asarray(small.ex.preprocess[0]({"x": jnp.asarray(X)})["x"])
    np.testing.assert_array_equal(small.first(20), first[:20])
    np.testing.assert_array_equal(small.first(5000), first)
    start, _ = trained[0]
    np.testing.assert_array_equal(start["stem/kernel"], whitening(first, 2, 2, 5e-4))
    other = {"stem": {"kernel": np.zeros((2, 2, 3, 24)), "bias": NOISE.normal(size=24)}}
    after = models.Whitening()(other, first)
    np.testing.assert_array_equal(after["stem"]["kernel"], start["stem/kernel"])
    np.testing.assert_array_equal(after["stem"]["bias"], other["stem"]["bias"])


@pytest.mark.parametrize(
    ("kernel", "said"),
    [("stam/kernel", "there is none; there are BatchNorm"), ("head/kernel", "shape")],
)
def test_whitening_says_what_does_not_fit(kernel: str, said: str) -> None:
    params = {"BatchNorm_0": {"bias": np.zeros(4)}, "head": {"kernel": np.zeros((4, 10))}}
    with pytest.raises(UserError, match=said):
        models.Whitening(kernel)(params, X.astype(np.float32))


def test_the_stem_stays_and_its_bias_learns_for_three_epochs(trained: Any) -> None:
    params = [before for before, _ in trained]
    for stem in params:
        np.testing.assert_array_equal(stem["stem/kernel"], params[0]["stem/kernel"])
    for name, until in (("stem/bias", 9), ("head/kernel", 11)):
        moved = [bool((a[name] != b[name]).any()) for a, b in pairwise(params)]
        assert moved == [True] * until + [False] * (11 - until)


def test_rates_are_those_of_a_summed_loss(trained: Any) -> None:
    """One step of each kind, in numpy, from the gradient of the mean of 16 examples."""
    (before, grads), (after, _), *_ = trained

    def stepped(name: str, lr: float) -> np.ndarray:
        g = 16 * grads[name] + 2e-6 * 16 / lr * before[name]
        return before[name] - lr * (g + 0.85 * g)  # Nesterov's first step

    for name, lr in (("head/kernel", 0.67), ("stem/bias", 0.053), ("BatchNorm_3/bias", 0.053)):
        np.testing.assert_allclose(after[name], stepped(name, lr), rtol=2e-4, atol=1e-6)
    w = before["Conv_2/kernel"].reshape(-1, 6)
    d = (w * np.sqrt(6) / np.linalg.norm(w) - after["Conv_2/kernel"].reshape(-1, 6)) / 0.24
    u, s, vt = np.linalg.svd(grads["Conv_2/kernel"].reshape(-1, 6), full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    np.testing.assert_allclose(d, u * s @ vt, atol=2e-4)


def test_muon_with_summed_momentum_is_what_airbench_writes() -> None:
    """buf <- β·buf + g, and g + β·buf is made orthogonal; by numpy's SVD, on square matrices."""
    optimizer = optim.Muon(
        1.0, rest=optim.SGD(0.1), momentum=0.6, averaged=False, ns_steps=3, matrices="w"
    )
    tx = optimizer.build(3)
    params = {"w": jnp.zeros((5, 5)), "b": jnp.zeros(5)}
    state, buf = tx.init(params), np.zeros((5, 5))
    for _ in range(3):
        g = NOISE.normal(size=(5, 5))
        updates, state = tx.update({"w": jnp.asarray(g), "b": jnp.zeros(5)}, state, params)
        buf = 0.6 * buf + g
        u, s, vt = np.linalg.svd(g + 0.6 * buf)
        s = s / np.linalg.norm(s)
        for _ in range(3):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        np.testing.assert_allclose(updates["w"], -(u * s @ vt), atol=1e-5)


@pytest.mark.parametrize("schedule", [schedules.Linear, schedules.Cosine])
def test_a_schedule_may_end_before_the_run(schedule: type[schedules.Linear]) -> None:
    whole, part = schedule(2.0, final=0.5), schedule(2.0, final=0.5, until=0.25)
    rates = [part.build(40)(t) for t in range(40)]
    np.testing.assert_allclose(rates[:10], [whole.build(10)(t) for t in range(10)])
    assert rates[10:] == [0.5] * 30
    assert [schedule(2.0, until=10).build(40)(t) for t in (9, 10, 39)][1:] == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"until=1\.5"):
        schedule(1.0, until=1.5)


def sides(p: Plan, feed: Feed, state: State, epoch: int) -> dict[int, bool]:
    """Whether each example of an epoch is mirrored, by its number in the data."""
    found = {}
    key = jax.random.fold_in(state.key, 2**32 - 1)
    flip = jax.jit(data.AlternatingFlip())
    for step in range(3 * epoch, 3 * epoch + 3):
        batch = assemble(feed.resident, jax.tree.map(lambda a: a[0], feed.fed(step)))
        flipped = flip(jax.random.split(key, 16), {**batch, "key": key})["x"]
        for index, x, was in zip(*map(np.asarray, (batch["index"], flipped, batch["x"]))):
            np.testing.assert_array_equal(was, X[index])
            assert (x == was).all() or (x == was[:, ::-1]).all()
            found[int(index)] = bool((x != was).any())
    return found


def test_alternating_flips_show_the_other_side_in_the_next_epoch() -> None:
    p, other = linear(), linear("seed=1")
    with p.feed() as feed:
        first, second, third = (sides(p, feed, p.init(), epoch) for epoch in range(3))
        assert first != sides(p, feed, other.init(), 0)
    assert len(first) == 48
    assert second == {index: not mirrored for index, mirrored in first.items()}
    assert third == first
    assert 10 < sum(first.values()) < 38


def test_training_takes_the_flip_from_the_runs_key() -> None:
    p, plain = linear(augment=(data.AlternatingFlip(),)), linear(augment=())
    state = p.init()
    with p.feed() as feed:
        flips = sides(p, feed, state, 1)
        batch = assemble(feed.resident, jax.tree.map(lambda a: a[0], feed.fed(4)))
    flip = np.array([flips[int(index)] for index in batch["index"]])[:, None, None, None]
    by_hand = {**batch, "x": jnp.where(flip, batch["x"][:, :, ::-1], batch["x"])}
    losses = [
        float(gradient(q.ex, state, b)[1]["loss"].total)
        for q, b in ((p, batch), (plain, by_hand), (plain, batch))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(losses[2], rel=1e-6)


def test_views_are_the_six_of_airbench() -> None:
    views = data.MirrorShift()
    x = NOISE.normal(size=(2, 5, 6, 3)).astype(np.float32)
    got = np.asarray(views(jnp.asarray(x)))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shifted = [x, padded[:, 0:5, 0:6], padded[:, 2:7, 2:8]]
    expected = np.stack([s[:, :, ::flip] for s in shifted for flip in (1, -1)], 1)
    np.testing.assert_array_equal(got, expected)
    assert views.weights == (0.25, 0.25, 0.125, 0.125, 0.125, 0.125)


def test_an_evaluation_averages_the_outputs_of_its_views() -> None:
    p, views = linear(), data.MirrorShift()
    state = p.init()
    images = np.asarray(p.ex.preprocess[0]({"x": jnp.asarray(X[::-1])})["x"])
    args = p.ex, state.params, state.variables
    one_by_one = sum(
        weight * forward(*args, view, None)[0]
        for weight, view in zip(views.weights, views(jnp.asarray(images)).swapaxes(0, 1))
    )
    np.testing.assert_allclose(viewed(*args, images, views), one_by_one, atol=1e-5)
    for split, outputs in (("views", one_by_one), ("test", forward(*args, images, None)[0])):
        found = p.evaluators()[split](state.params, state.variables)
        right = np.asarray(outputs).argmax(-1) == Y[::-1]
        assert found["accuracy"] == pytest.approx(right.mean())
        true = np.asarray(jax.nn.log_softmax(outputs))[np.arange(48), Y[::-1]]
        assert found["loss"] == pytest.approx(-true.mean(), rel=1e-5)


def test_views_belong_to_evals() -> None:
    with pytest.raises(ValueError, match="views: 'other': expected one of test, views"):
        experiment(views={"other": data.MirrorShift()})


def test_what_the_pool_drops_is_not_computed() -> None:
    """The network is that which computes it: 15 -> 7 -> 3 -> 1, with padding as PyTorch's."""
    net = models.Airbench(widths=(4, 6))
    x = NOISE.normal(size=(3, 16, 16, 3)).astype(np.float32)
    variables = jax.jit(partial(net.init, train=False))(jax.random.key(0), x)
    params = variables["params"]

    def convolved(x: jax.Array, kernel: jax.Array, padding: str) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)

    h = convolved(jnp.asarray(x), params["stem"]["kernel"], "VALID") + params["stem"]["bias"]
    h = jax.nn.gelu(h)
    for i in range(4):
        h = convolved(h, params[f"Conv_{i}"]["kernel"], "SAME")
        if i % 2 == 0:
            low = (1, 2, 2, 1)
            h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, low, low, "VALID")
        h = (h - h.mean((0, 1, 2))) / jnp.sqrt(h.var((0, 1, 2)) + 1e-12)
        h = jax.nn.gelu(h + params[f"BatchNorm_{i}"]["bias"])
    expected = h.max((1, 2)) @ params["head"]["kernel"] / 6
    apply = jax.jit(partial(net.apply, train=True, mutable=["batch_stats"]))
    got, _ = apply(variables, x)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    head = np.asarray(params["head"]["kernel"])
    assert head.std(ddof=1) == pytest.approx(1, rel=1e-5)
    assert np.abs(head).max() < 2.2  # uniform, ±√3 but for what a sample's sd is off
