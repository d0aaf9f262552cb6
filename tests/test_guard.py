"""The guard: a bad step is skipped or rolled back from, and a run stays a function of its seed."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeco import config, data, losses, models, optim
from jaxeco.checkpoint import Checkpoints
from jaxeco.errors import UserError
from jaxeco.experiment import Experiment, Guard, Steps
from jaxeco.fit import fit
from jaxeco.interrupt import Interrupt
from jaxeco.log import Log, read_metrics
from jaxeco.plan import plan
from jaxeco.recovery import Diverged
from jaxeco.train import State, train_step

N, B, STEPS, POISON = 48, 8, 14, 7
rng = np.random.default_rng(0)
X = rng.normal(size=(N, 4)).astype(np.float32)
Y = (X.sum(1) > 0).astype(np.int32)
X[POISON] = np.nan  # whichever batch has this example is bad
BAD = [3, 11, 12, 19, 24, 35]  # those batches, with seed 7; see `test_which_batches_are_bad`


def experiment(x: np.ndarray = X, **changes: Any) -> Experiment:
    ex = Experiment(
        name="test",
        seed=7,
        train=data.Arrays(x, Y),
        evals={},
        model=models.MLP(widths=(8,), num_classes=2, dropout=0.25, batch_norm=True),
        loss=losses.SoftmaxCrossEntropy(),
        optimizer=optim.Adam(lr=0.01),
        batch=B,
        length=Steps(STEPS),
        eval_batch=16,
        eval_every=Steps(8),
        save_every=Steps(6),
        log_every=Steps(2),
        keep=4,
    )
    return dataclasses.replace(ex, **changes)


class Killed(Exception):
    pass


class Log_(Log):
    """May be killed where it is to record a step."""

    kill_at: int | None = None

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        if self.kill_at is not None and step >= self.kill_at and values["rolled_back"]:
            raise Killed
        super().train(step, values)


def train(
    folder: Path, ex: Experiment, stop_at: int | None = None, kill_at: int | None = None
) -> State:
    """One session in `folder`, resumed if there is something to resume."""
    p = plan(ex, jax.devices()[:1])
    with (
        Interrupt() as interrupt,
        Checkpoints(folder / "checkpoints", description={}, keep=ex.keep) as saved,
    ):
        state, step = saved.restore(p.abstract_state()) or (p.start(), 0)
        options: dict[str, Any] = {"examples_per_step": B, "trackers": ()}
        with Log_(folder, total_steps=p.steps, first_step=step, **options) as log:
            log.kill_at = kill_at
            return fit(p, state, saved, log, interrupt, stop_at)


def bits(tree: Any) -> list[bytes]:
    keys = jnp.issubdtype
    leaves = jax.tree.leaves(tree)
    data = [jax.random.key_data(a) if keys(a.dtype, jax.dtypes.prng_key) else a for a in leaves]
    return [np.asarray(a).tobytes() for a in data]


def lines(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder) if line["split"] == split]


def by_hand(batches: list[int | None]) -> State:
    """A run without loop or guard: step t has batches[t], or is left out."""
    p = plan(experiment(), jax.devices()[:1])
    call, feed, state = p.compiled(), p.feed(), p.start()
    for batch in batches:
        if batch is None:
            state = state.replace(step=state.step + 1)
        else:
            state, _ = call(state, feed.resident, feed.fed(batch))
    return state


def model(state: State) -> Any:
    return state.params, state.variables, state.opt_state


def assert_close(a: Any, b: Any) -> None:
    """But for roundings: a program with a guard is another program."""
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


def test_which_batches_are_bad() -> None:
    feed = plan(experiment(), jax.devices()[:1]).feed()
    assert [t for t in range(40) if POISON in feed.plan(t)["row"]] == BAD


def test_a_skipped_step_leaves_all_as_it_was(tmp_path: Path) -> None:
    end = train(tmp_path, experiment(guard=Guard("skip"), steps_per_call=2))
    expected = by_hand([None if t in BAD else t for t in range(STEPS)])
    assert_close(model(end), model(expected))
    assert (int(end.step), int(end.offset), int(end.guard.count)) == (STEPS, 0, 3)
    assert [(line["step"], line["skipped"]) for line in lines(tmp_path)] == [
        *((2, 0), (4, 1), (6, 1), (8, 1), (10, 1), (12, 2), (14, 3))
    ]
    assert np.isfinite([line["loss"] for line in lines(tmp_path)]).all()


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_a_skipped_step_on_many_devices(how: str) -> None:
    """The poison lies on one device; all of them leave the step out, and one micro-batch it all."""
    p = plan(experiment(guard=Guard("skip"), parallel=how, grad_accum=2), jax.devices()[:2])
    call, feed, state = p.compiled(), p.feed(), p.start()
    state, _ = call(state, feed.resident, feed.fed(1))
    before = jax.device_get(model(state))
    state, sums = call(state, feed.resident, feed.fed(BAD[1]))
    assert bits(jax.device_get(model(state))) == bits(before)
    assert sums["guard"].bad.tolist() == [True]
    state, sums = call(state, feed.resident, feed.fed(2))
    assert bits(jax.device_get(model(state))) != bits(before)
    assert (int(state.step), int(state.guard.count)) == (3, 1)
    assert sums["guard"].bad.tolist() == [False]


def test_a_roll_back_passes_over_the_batches_up_to_the_bad_one(tmp_path: Path) -> None:
    end = train(tmp_path, experiment(guard=Guard("rollback")))
    # batch 3 is bad at step 3: back to the start, and on with batch 4; batch 11 at step 7: back to
    # the checkpoint of step 6, and on with 12, bad as well; on with 13; batch 19 is bad at step 12,
    # of which there is a checkpoint: on with 20
    batches = [*range(4, 10), *range(13, 19), 20, 21]
    assert_close(model(end), model(by_hand(batches)))  # type: ignore[arg-type]
    assert (int(end.step), int(end.offset), int(end.guard.count)) == (STEPS, 8, 4)
    recorded = lines(tmp_path)
    assert [line["step"] for line in recorded] == sorted({line["step"] for line in recorded})
    assert [line["rolled_back"] for line in recorded] == [1] * 3 + [3] * 3 + [4]
    assert np.isfinite([line["loss"] for line in recorded]).all()


def test_resumed_is_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    test = data.Arrays(X[8:24], Y[8:24])
    ex = experiment(guard=Guard("rollback"), evals={"test": test})
    whole = train(tmp_path / "whole", ex)
    with pytest.raises(Killed):  # after the roll-back to step 0, before a checkpoint
        train(tmp_path / "parts", ex, kill_at=2)
    for stop in (3, 7):  # where an uninterrupted run does not save; batch 11 is next
        train(tmp_path / "parts", ex, stop_at=stop)
    with pytest.raises(Killed):
        train(tmp_path / "parts", ex, kill_at=12)
    assert bits(train(tmp_path / "parts", ex)) == bits(whole)
    assert lines(tmp_path / "parts")[-1]["rolled_back"] == 4


def test_the_guard_gives_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Diverged, match="at step 12, after 1 skipped steps") as error:
        train(tmp_path / "a", experiment(guard=Guard("skip", limit=1)))
    assert (error.value.step, int(error.value.state.step)) == (11, 12)
    said = capsys.readouterr().out
    assert "warning: the loss is nan at step 4: skipped (1 of" in said
    with pytest.raises(Diverged, match="at step 7, after 2 roll-backs"):
        train(tmp_path / "b", experiment(guard=Guard("rollback", limit=2)))
    said = capsys.readouterr().out
    assert "at step 8: back to step 6, without the batches of steps 7 to 8 (roll-back 2)" in said


def judged_by_hand(guard: Guard, loss_n: list[float]) -> list[bool]:
    """Which losses are bad: f32 like the step's own arithmetic."""
    average, seen, bad_n = 0.0, 0, []
    for loss in loss_n:
        assert guard.factor is not None
        bad = seen > 0 and loss > guard.factor * average
        bad_n.append(bad or not np.isfinite(loss))
        if not bad_n[-1]:
            seen = min(seen + 1, 100)
            average += (loss - average) / seen
    return bad_n


def test_an_exploding_loss_is_bad() -> None:
    x = np.nan_to_num(X)
    x[POISON] = 1e4
    plain = models.MLP(widths=(8,), num_classes=2)
    ex = experiment(x, guard=Guard("skip", factor=5), model=plain)
    p = plan(ex, jax.devices()[:1])
    feed, state = p.feed(), p.start()
    state, sums = p.compiled()(state, feed.resident, feed.fed(1, 30))
    loss_n = np.asarray(sums["loss"].total / sums["loss"].weight).tolist()
    bad_n = judged_by_hand(ex.guard, loss_n)  # type: ignore[arg-type]
    assert sums["guard"].bad.tolist() == bad_n
    assert {i + 1 for i in np.flatnonzero(bad_n)} & set(BAD)
    assert {i + 1 for i in np.flatnonzero(bad_n)} <= set(BAD)


def test_without_a_guard_the_program_and_the_state_are_as_they_were() -> None:
    p = plan(experiment(), jax.devices()[:1])
    state = jax.eval_shape(p.init)
    assert state.guard is None
    assert len(jax.tree.leaves(state)) == 3 + len(jax.tree.leaves(model(state)))
    _, sums = jax.eval_shape(partial(train_step, p.ex, p.tx), state, _batch())
    assert sums.keys() == {"loss"}


def _batch() -> dict[str, Any]:
    return {"x": jnp.zeros((B, 4)), "y": jnp.zeros(B, jnp.int32), "mask": jnp.ones(B)}


@pytest.mark.parametrize("text", ["skip", "rollback,factor:10,limit:3", "skip, limit:1"])
def test_a_guard_on_the_command_line(text: str) -> None:
    guard = Guard.parse(text)
    assert Guard.parse(str(guard)) == guard
    assert config.override(experiment(), ["guard"], text, "guard").guard == guard


@pytest.mark.parametrize(
    "text", ["jump", "skip,factor", "skip,factor:1", "skip,limit:0", "skip,limit:1,limit:2", ""]
)
def test_a_guard_that_is_none(text: str) -> None:
    told = "expected skip or|expected a number|expected a whole|given twice"
    with pytest.raises(ValueError, match=told):
        Guard.parse(text)
    with pytest.raises(UserError, match=rf"guard=.*({told})"):
        config.override(experiment(), ["guard"], text, "guard")
