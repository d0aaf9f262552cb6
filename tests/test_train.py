"""The train step and the loop, by their properties."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeco import data, losses, metrics, models, optim
from jaxeco.checkpoint import Checkpoints
from jaxeco.data.pipeline import assemble
from jaxeco.errors import UserError
from jaxeco.experiment import Epochs, Experiment, Steps
from jaxeco.fit import fit, stalled
from jaxeco.interrupt import Interrupt
from jaxeco.log import Log, read_metrics
from jaxeco.plan import Plan, plan
from jaxeco.pretrained import Pretrained
from jaxeco.recovery import Diverged
from jaxeco.train import State

rng = np.random.default_rng(0)
X = rng.integers(0, 256, (100, 8, 8, 3)).astype(np.uint8)
Y = (X.mean((1, 2, 3)) > 127).astype(np.int32)


def experiment(**changes: Any) -> Experiment:
    """Batch norm, dropout, augmentation on 100 small images: what could tell devices apart."""
    ex = Experiment(
        name="test",
        train=data.Arrays(X, Y, classes=("dark", "bright")),
        evals={"test": data.Arrays(X[:37], Y[:37], classes=("dark", "bright"))},
        preprocess=(data.Normalize(mean=(0.5, 0.5, 0.5), sd=(0.5, 0.5, 0.5)),),
        augment=(data.Flip(), data.Crop(1)),
        model=models.MLP(widths=(16,), num_classes=2, dropout=0.25, batch_norm=True),
        loss=losses.SoftmaxCrossEntropy(),
        metrics=(metrics.Accuracy(),),
        optimizer=optim.Momentum(lr=0.05, momentum=0.9),
        batch=16,
        length=Steps(20),
        eval_batch=16,
        eval_every=Steps(10),
        save_every=Steps(5),
        log_every=Steps(4),
    )
    return dataclasses.replace(ex, **changes)


def run_steps(p: Plan, n: int, calls: int = 1) -> tuple[State, np.ndarray]:
    """n steps in `calls` calls; returns the State and the mean loss of each step."""
    call, feed = p.compiled(), p.feed()
    state, history = p.start(), []
    for i in range(calls):
        state, sums = call(state, feed.resident, feed.fed(i * (n // calls), n // calls))
        history.append(sums["loss"].total / sums["loss"].weight)
    return state, np.concatenate(history)


def assert_close(a: Any, b: Any, rtol: float) -> None:
    """Relative to each entry, or to the largest of all (a bias before batch norm is only noise)."""
    largest = max(np.abs(np.asarray(leaf)).max() for leaf in jax.tree.leaves(b))
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=rtol, atol=rtol * largest)


@pytest.fixture(scope="module")
def one_device() -> tuple[State, np.ndarray]:
    return run_steps(plan(experiment(), jax.devices()[:1]), 20, calls=20)


@pytest.mark.parametrize("how", ["jit", "shard_map", "pmap"])
def test_eight_devices_agree_with_one(how: str, one_device: tuple[State, np.ndarray]) -> None:
    assert jax.device_count() == 8
    state, losses_n = run_steps(plan(experiment(parallel=how)), 20, calls=20)
    np.testing.assert_allclose(losses_n, one_device[1], rtol=1e-5)
    assert_close(
        (state.params, state.variables), (one_device[0].params, one_device[0].variables), 1e-5
    )


@pytest.mark.parametrize("how", ["jit", "shard_map"])
def test_many_steps_in_a_call_are_the_same_steps(
    how: str, one_device: tuple[State, np.ndarray]
) -> None:
    _, losses_n = run_steps(plan(experiment(parallel=how)), 20, calls=4)
    np.testing.assert_allclose(losses_n, one_device[1], rtol=1e-5)


def batch_of(p: Plan) -> dict[str, Any]:
    index = np.arange(p.ex.batch, dtype=np.int32)
    return assemble({"x": X, "y": Y}, {"row": index})


def test_the_step_needs_no_compiler() -> None:
    p = plan(experiment(augment=(data.Flip(),)))
    state, batch = p.init(), batch_of(p)
    eager = p.step(state, batch)
    assert_close(jax.jit(p.step)(state, batch)[0].params, eager[0].params, 1e-5)
    assert int(eager[0].step) == 1
    assert float(eager[1]["loss"].weight) == 16


def test_the_loss_of_the_first_step_is_that_of_the_model_by_hand() -> None:
    ex = experiment(augment=(), model=models.MLP(widths=(), num_classes=2))
    p = plan(ex)
    state, batch = p.init(), batch_of(p)
    (dense,) = state.params.values()
    x = (np.float64(batch["x"]).reshape(16, -1) / 255 - 0.5) / 0.5
    logits = x @ np.float64(dense["kernel"]) + np.float64(dense["bias"])
    logits -= logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -log_p[np.arange(16), batch["y"]].sum()
    new, sums = jax.jit(p.step)(state, batch)
    np.testing.assert_allclose(float(sums["loss"].total), expected, rtol=1e-5)
    gradient = x.T @ (np.exp(log_p) - np.eye(2)[np.asarray(batch["y"])]) / 16
    np.testing.assert_allclose(
        np.asarray(new.params[next(iter(new.params))]["kernel"]),
        np.float64(dense["kernel"]) - 0.05 * gradient,
        rtol=1e-4,
        atol=1e-6,
    )


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    plain = models.MLP(
        widths=(16,), num_classes=2
    )  # no dropout, no batch norm: nothing depends on A
    whole, losses_whole = run_steps(plan(experiment(model=plain, batch=32)), 6, calls=6)
    for how in ("jit", "shard_map"):
        ex = experiment(model=plain, batch=32, grad_accum=4, parallel=how)
        parts, losses_parts = run_steps(plan(ex), 6, calls=6)
        np.testing.assert_allclose(losses_parts, losses_whole, rtol=1e-5)
        assert_close(parts.params, whole.params, 1e-5)


def test_accumulation_with_batch_norm_and_dropout_does_not_depend_on_devices() -> None:
    ex = experiment(batch=32, grad_accum=2)
    _, one = run_steps(plan(ex, jax.devices()[:1]), 6, calls=6)
    for how in ("jit", "shard_map"):
        _, eight = run_steps(plan(dataclasses.replace(ex, parallel=how)), 6, calls=6)
        np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_clipping_bounds_the_update() -> None:
    ex = experiment(optimizer=optim.SGD(lr=1.0), clip_norm=0.01)
    p = plan(ex)
    before = p.init()
    after, _ = jax.jit(p.step)(before, batch_of(p))
    change = jax.tree.map(lambda a, b: a - b, after.params, before.params)
    norm = np.sqrt(sum(float(jnp.sum(c**2)) for c in jax.tree.leaves(change)))
    np.testing.assert_allclose(norm, 0.01, rtol=1e-3)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32() -> None:
    p = plan(experiment(precision="bfloat16"))
    state, batch = p.init(), batch_of(p)
    new, sums = jax.jit(p.step)(state, batch)
    assert {a.dtype for a in jax.tree.leaves((new.params, new.variables))} == {jnp.dtype("float32")}
    exact = jax.jit(plan(experiment()).step)(state, batch)[1]["loss"].total
    assert 0 < abs(float(sums["loss"].total - exact)) < 0.02 * float(exact)
    text = jax.jit(p.step).lower(state, batch).as_text()
    assert any("dot_general" in line and "bf16" in line for line in text.splitlines())


def test_masked_examples_do_not_count() -> None:
    model = models.MLP(widths=(16,), num_classes=2)
    p = plan(experiment(model=model, augment=()))
    state, batch = p.init(), batch_of(p)
    padded = {
        "x": jnp.concatenate([batch["x"], batch["x"][:4] * 0]),
        "y": jnp.concatenate([batch["y"], batch["y"][:4]]),
        "mask": jnp.concatenate([batch["mask"], jnp.zeros(4)]),
    }
    a, sums_a = jax.jit(p.step)(state, batch)
    b, sums_b = jax.jit(p.step)(state, padded)
    assert_close(b.params, a.params, 1e-6)
    assert_close(sums_b, sums_a, 1e-6)


def train(folder: Path, ex: Experiment, stop_at: int | None = None) -> State:
    """One session in `folder`, resumed if there is something to resume."""
    p = plan(ex, jax.devices()[:2])
    best = {"best": ex.best, "best_mode": ex.best_mode}
    with (
        Interrupt() as interrupt,
        Checkpoints(folder / "checkpoints", description={}, **best) as saved,
    ):
        state, step = saved.restore(p.abstract_state()) or (p.start(), 0)
        with Log(folder, total_steps=p.steps, first_step=step, examples_per_step=ex.batch) as log:
            return fit(p, state, saved, log, interrupt, stop_at)


@pytest.mark.parametrize("changes", [{}, {"steps_per_call": 5}, {"resident_gib": 0.0}])
def test_resumed_is_uninterrupted_to_the_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    ex = experiment(**changes)
    whole = train(tmp_path / "whole", ex)
    train(tmp_path / "parts", ex, stop_at=10)
    assert len(read_metrics(tmp_path / "parts")) < len(read_metrics(tmp_path / "whole"))
    parts = train(tmp_path / "parts", ex)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_data_on_the_device_or_read_ahead_is_the_same_run(tmp_path: Path) -> None:
    resident = train(tmp_path / "a", experiment())
    streamed = train(tmp_path / "b", experiment(resident_gib=0.0))
    assert_close(streamed.params, resident.params, 1e-6)


def test_what_the_log_holds(tmp_path: Path) -> None:
    train(tmp_path, experiment())
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if line["split"] == "test"] == [10, 20]
    assert [line["step"] for line in lines if line["split"] == "train"] == [
        *(4, 5, 8, 10, 12, 15, 16, 20)  # where the log, a checkpoint or an evaluation was due
    ]
    assert all({"loss", "accuracy"} <= line.keys() for line in lines)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state(tmp_path: Path) -> None:
    ex = experiment(optimizer=optim.SGD(lr=1e30), save_every=Steps(1), eval_every=Steps(20))
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) at step [1-9]") as error:
        train(tmp_path, ex)
    assert int(error.value.state.step) >= 1


class After(Interrupt):
    """A signal that arrives when the loop has asked for it so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def asked(self) -> bool:
        self.times -= 1
        return self.times < 0


@pytest.mark.parametrize("times", [1, 3, 5])  # in the first split, in the second, after both
def test_an_interrupted_evaluation_is_made_up_for(tmp_path: Path, times: int) -> None:
    test = experiment().evals["test"]
    ex = experiment(length=Steps(2), evals={"a": test, "b": test}, best="b/accuracy")
    train(tmp_path, ex, stop_at=1)
    p = plan(ex, jax.devices()[:2])
    with Checkpoints(tmp_path / "checkpoints", description={}, best=ex.best) as saved:
        restored = saved.restore(p.abstract_state())
        assert restored is not None
        with Log(tmp_path, total_steps=2, first_step=1, examples_per_step=16) as log:
            fit(p, restored[0], saved, log, After(times))
    train(tmp_path, ex)
    recorded = [(line["step"], line["split"]) for line in read_metrics(tmp_path)]
    assert recorded.count((2, "a")) == recorded.count((2, "b")) == 1
    with Checkpoints(tmp_path / "checkpoints", description={}, best=ex.best) as saved:
        assert saved.steps()[-1] == 2
        assert saved.best_step() in (1, 2)


def patient(patience: int, lr: float = 0.05, **changes: Any) -> Experiment:
    return experiment(
        best="test/loss",
        patience=patience,
        optimizer=optim.SGD(lr=lr),
        eval_every=Steps(2),
        save_every=Steps(4),
        **changes,
    )


def test_patience_ends_the_run_and_a_resumed_one_decides_alike(tmp_path: Path) -> None:
    ex = patient(3, lr=1e-30)  # the parameters stay, and nothing gets better after the first
    ex = dataclasses.replace(ex, model=models.MLP(widths=(4,), num_classes=2))
    assert int(train(tmp_path / "a", ex).step) == 8  # best at 2, no better at 4, 6 and 8
    assert int(train(tmp_path / "a", ex).step) == 8  # and it stays at that
    assert int(train(tmp_path / "b", ex, stop_at=6).step) == 6
    assert int(train(tmp_path / "b", ex).step) == 8


@pytest.mark.parametrize(
    ("values", "mode", "patience", "since"),
    [
        ([3.0, 2.0, 2.5, 2.0], "min", 2, 2),  # an equal is no better
        ([3.0, 2.0, 2.5, 2.0], "min", 3, None),
        ([3.0, 2.0, 2.5, 1.9], "min", 1, None),
        ([0.1, 0.5, 0.2, 0.3], "max", 2, 2),
        ([np.nan, 0.5, np.nan, np.nan], "max", 2, 2),
        ([np.nan, np.nan], "max", 1, 1),
        ([], "max", 1, None),
    ],
)
def test_what_counts_as_better(
    tmp_path: Path, values: list[float], mode: str, patience: int, since: int | None
) -> None:
    name = "loss" if mode == "min" else "accuracy"
    ex = experiment(best=f"test/{name}", patience=patience, eval_every=Steps(1))
    p = plan(ex, jax.devices()[:1])
    options: dict[str, Any] = {"total_steps": 9, "examples_per_step": 1, "trackers": ()}
    with Log(tmp_path, **options) as log:
        for step, value in enumerate(values, 1):
            log.evaluation(step, "test", {name: value})
        assert stalled(p, log) == since
    with Log(tmp_path, first_step=9, **options) as log:  # as a resumed run sees it
        assert stalled(p, log) == since
        assert stalled(plan(dataclasses.replace(ex, patience=None)), log) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patience": 3}, r"patience=3, best=None: expected at least 1, and a best"),
        ({"patience": 0, "best": "test/loss"}, r"patience=0, best='test/loss': expected at least"),
        ({"eval_metrics": (metrics.Accuracy(),)}, "two are called 'accuracy'"),
    ],
)
def test_an_experiment_checks_its_fields(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experiment(**changes)


def test_a_run_starts_from_the_parameters_of_another(tmp_path: Path) -> None:
    ex = experiment(length=Steps(2), optimizer=optim.SGD(lr=0.05), best="test/loss")
    first = train(tmp_path, ex)
    source = Pretrained(str(tmp_path), checkpoint="newest", fresh=("out/.*|.*_1/.*",))
    p = plan(experiment(start_from=source, seed=1), jax.devices()[:2])
    reports: list[Any] = []
    state = p.start(reports.append)
    fresh = jax.device_get(plan(experiment(seed=1), jax.devices()[:2]).start().params)
    for name, leaf in jax.tree.leaves_with_path(state.params):
        key = jax.tree_util.keystr(name, simple=True, separator="/")
        origin = first.params if key in reports[0].loaded else fresh
        (expected,) = [a for path, a in jax.tree.leaves_with_path(origin) if path == name]
        np.testing.assert_array_equal(leaf, expected)
    assert reports[0].loaded and reports[0].fresh
    feed = p.feed()
    state, sums = p.compiled()(state, feed.resident, feed.fed(0))  # its buffers can be given up
    assert int(state.step) == 1 and np.isfinite(sums["loss"].total).all()


def test_a_batch_in_which_nothing_counts_changes_nothing() -> None:
    p = plan(experiment(loss=losses.SoftmaxCrossEntropy(class_weights=(0.0, 1.0))))
    state, batch = p.init(), batch_of(p)
    new, sums = jax.jit(p.step)(state, batch | {"y": jnp.zeros_like(batch["y"])})
    assert float(sums["loss"].weight) == 0
    assert_close(new.params, state.params, 0)


def test_a_state_that_diverged_is_not_called_good(tmp_path: Path) -> None:
    ex = experiment(optimizer=optim.SGD(lr=1e30), length=Steps(3), eval_every=Steps(1))
    with pytest.raises(Diverged, match=r"the loss on 'test' is (nan|inf) after step 1"):
        train(tmp_path, ex)
    with Checkpoints(tmp_path / "checkpoints", description={}) as saved:
        assert saved.steps() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 12}, "batch=12 is not divisible by 8 devices; try batch=8 or 16"),
        ({"batch": 16, "grad_accum": 4}, "8 devices x grad_accum=4 = 32"),
        ({"eval_batch": 9}, "eval_batch=9 is not divisible by 8 devices"),
        ({"batch": 104}, "batch=104 is more than the 100 examples"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(experiment(**changes))


def test_epochs_count_steps_without_the_remainder() -> None:
    p = plan(experiment(length=Epochs(1.5)))
    assert (p.steps_per_epoch, p.steps) == (6, 9)
