"""What the watch sees: programs compiled anew, with their shapes; devices that wait for data."""

import dataclasses
import io
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeco import data, losses, metrics, models, optim
from jaxeco.checkpoint import Checkpoints
from jaxeco.data.pipeline import Feed, Fields
from jaxeco.experiment import Experiment, Guard, Steps
from jaxeco.fit import fit
from jaxeco.interrupt import Interrupt
from jaxeco.log import Log, read_metrics
from jaxeco.plan import plan
from jaxeco.watch import LOWERING, Watch

rng = np.random.default_rng(0)
X = rng.normal(size=(64, 4)).astype(np.float32)
Y = (X.sum(1) > 0).astype(np.int32)
SUMS = {"loss": metrics.Mean(jnp.zeros(1), jnp.ones(1))}


def log_to(folder: Path) -> tuple[Log, io.StringIO]:
    stream = io.StringIO()
    options: dict[str, Any] = {"examples_per_step": 8, "trackers": ()}
    return Log(folder, total_steps=9, stream=stream, **options), stream


def feed(resident: bool = True) -> Feed:
    return Feed.training(data.Arrays(X, Y).open(), 8, 0, resident=resident)


def test_a_new_shape_is_told_and_known_lengths_are_no_alarm(tmp_path: Path) -> None:
    log, stream = log_to(tmp_path)

    @jax.jit
    def call(x: jax.Array) -> jax.Array:
        return x + 1

    with log, Watch(log, feed()) as watch:
        call(jnp.zeros((1, 8)))
        watch.called(0, 1, SUMS)
        call(np.zeros((1, 8), np.float32))
        watch.called(1, 1, SUMS)
        assert stream.getvalue() == ""
        call(np.zeros((4, 8), np.float32))
        watch.called(2, 4, SUMS)
        assert "compiled calls of 4 steps after step 2: 0." in stream.getvalue()
        assert "warning" not in stream.getvalue()
        call(np.zeros((1, 7), np.float32))
        watch.called(6, 1, SUMS)
        (said,) = [line for line in stream.getvalue().splitlines() if "warning" in line]
        assert "compiled anew after step 6, for calls of one step: " in said
        assert "call" in said and "float32[1,7] (was float32[4,8])" in said
        for size in range(20, 30):
            call(np.zeros(size, np.float32))
            watch.compiled("an evaluation", 7)
    assert stream.getvalue().count("warning: compiled anew after") == 5  # no flood of them
    assert "compiled anew 10 times" in stream.getvalue()


def test_what_jax_is_asked_to_log_is_still_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, _ = log_to(tmp_path)
    level = LOWERING.level
    with log, Watch(log, feed()):
        jax.jit(lambda x: x * 2)(np.zeros(3))
        assert not caplog.records
        with jax.log_compiles():
            jax.jit(lambda x: x * 3)(np.zeros(3))
    assert any("Compiling" in record.getMessage() for record in caplog.records)
    assert (LOWERING.level, LOWERING.filters) == (level, [])
    assert isinstance(LOWERING, logging.Logger)


@dataclasses.dataclass(frozen=True)
class Varying(metrics.Metric):
    """Computes something of another shape each time: compiled each time."""

    seen: list[int] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        return "varying"

    def __call__(self, outputs: Any, y: Any, mask: Any) -> metrics.Mean:
        return metrics.Mean.of(jnp.ones(len(y)), mask)

    def result(self, sums: metrics.Mean) -> Any:
        self.seen.append(0)
        return float(np.asarray(jax.jit(jnp.cumsum)(np.ones(len(self.seen)))).max())


def trained(folder: Path, **changes: Any) -> str:
    ex = Experiment(
        name="test",
        train=data.Arrays(X, Y),
        evals={"test": data.Arrays(X[:16], Y[:16])},
        model=models.MLP(widths=(4,), num_classes=2),
        loss=losses.SoftmaxCrossEntropy(),
        optimizer=optim.SGD(lr=0.01),
        batch=8,
        length=Steps(9),
        eval_batch=16,
        eval_every=Steps(3),
        save_every=Steps(5),
        log_every=Steps(2),
    )
    p = plan(dataclasses.replace(ex, **changes), jax.devices()[:1])
    log, stream = log_to(folder)
    with log, Interrupt() as interrupt, Checkpoints(folder / "c", description={}) as saved:
        fit(p, p.start(), saved, log, interrupt)
    return stream.getvalue()


def test_a_run_compiles_nothing_anew_unless_a_metric_makes_it(tmp_path: Path) -> None:
    said = trained(tmp_path / "a", steps_per_call=2)  # calls of 2 and of 1
    assert "compiled calls of one step after step 2" in said
    assert "anew" not in said
    assert "data_wait" not in read_metrics(tmp_path / "a")[-1]
    said = trained(tmp_path / "b", eval_metrics=(Varying(),))
    assert said.count("compiled anew after step") == 2  # the evaluations after the first
    assert "for an evaluation: jit(cumsum)" in said and "[2] (was float" in said


def test_a_call_moves_nothing_to_the_device_but_what_it_is_fed() -> None:
    ex = Experiment(
        name="test",
        train=data.Arrays(X, Y),
        evals={},
        model=models.MLP(widths=(), num_classes=2),
        loss=losses.SoftmaxCrossEntropy(),
        optimizer=optim.SGD(lr=0.01),
        batch=8,
        length=Steps(9),
        guard=Guard("skip", factor=10),
    )
    p = plan(ex, jax.devices()[:1])
    call, feed, state = p.compiled(), p.feed(), p.start()
    fed = jax.device_put(feed.fed(0))
    with jax.transfer_guard("disallow"):
        state, _ = call(state, feed.resident, fed)
        with pytest.raises(Exception, match="isallowed host-to-device"):
            call(state, feed.resident, feed.fed(1))


class Slow(Feed):
    """Takes a while to find a batch."""

    seconds = 0.0

    def fed(self, step: int, n: int = 1) -> Fields:
        time.sleep(self.seconds)
        return super().fed(step, n)


@jax.jit
def work(x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 40, lambda _, x: jnp.tanh(x @ x), x)


@pytest.mark.parametrize("waits", [True, False])
def test_waiting_for_data(tmp_path: Path, waits: bool) -> None:
    """Reading takes four times as long as a step, or next to nothing."""
    x = jnp.ones((256, 256))
    for _ in range(2):
        began = time.perf_counter()
        jax.block_until_ready(work(x))
        seconds = time.perf_counter() - began
    log, stream = log_to(tmp_path)
    slow = Slow.training(data.Arrays(X, Y).open(), 8, 0, resident=False)
    slow.seconds = 4 * seconds if waits else 0.0
    with log, slow, Watch(log, slow) as watch:
        for step in range(round(2 / seconds / (4 if waits else 1))):
            watch.fed(step, 1)
            x = work(x)
            watch.called(step, 1, {"loss": metrics.Mean(x, x)})
            if step == 1:
                watch.mark()
        waited = watch.waiting()["data_wait"]
        jax.block_until_ready(x)
    assert waited > 0.5 if waits else waited < 0.3
    said = "of the training time went by waiting for data: resident_gib=" in stream.getvalue()
    assert said is waits
