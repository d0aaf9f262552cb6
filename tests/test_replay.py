"""A step taken anew is the step of the run, and the operation that went bad is found."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeco import culprit, replay, session
from jaxeco.config import load
from jaxeco.errors import RunFailed, UserError
from jaxeco.log import read_metrics
from jaxeco.plan import plan

FILE = '''
"""The example 7 is all zeros, of which the model takes the logarithm. With seed 7 the batches 3,
11, 12 and 19 have it, from 0; see tests/test_guard.py."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxeco import data, losses, optim
from jaxeco.experiment import Experiment, Guard, MeshShape, Steps

rng = np.random.default_rng(0)
X = rng.normal(size=(48, 4)).astype(np.float32)
Y = (X.sum(1) > 0).astype(np.int32)
X[7] = 0


class Loudness(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + jnp.log(jnp.sum(x**2, -1, keepdims=True))  # of nothing


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(2)(nn.tanh(nn.Dense(4)(Loudness(name="loudness")(x))))


def experiment(rollback: bool = False) -> Experiment:
    return Experiment(
        name="bad",
        seed=7,
        train=data.Arrays(X, Y),
        evals={},
        model=Net(),
        loss=losses.SoftmaxCrossEntropy(),
        optimizer=optim.SGD(lr=0.01),
        batch=8,
        length=Steps(14),
        save_every=Steps(2),
        log_every=Steps(1),
        mesh=MeshShape(data=1),
        guard=Guard("rollback", limit=1) if rollback else None,
    )
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that diverged at step 4, with checkpoints of the steps 2 and, not quite over, 4."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "file.py").write_text(FILE)
    with pytest.raises(RunFailed, match=r"at step 4; .* step 2; .*replay .* 4 --check names"):
        session.run(load(folder / "file.py"), folder / "run", resume=False, stop_at=None)
    return folder / "run"


def said(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert replay.main([*map(str, words)]) == 0
    return capsys.readouterr().out


def test_data_that_is_not_finite_is_named(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(FILE.replace("X[7] = 0", "X[7, 1] = np.nan"))
    p = plan(load(tmp_path / "file.py").experiment)
    lines = replay.checked(p, p.start().replace(step=jnp.int32(3)))
    place = list(np.asarray(p.feed().fed(3)["row"][0])).index(7)
    assert lines == [f"the data is not finite: x in example {place} of the batch"]


@pytest.mark.parametrize("step", [2, 3])  # from the start; from the checkpoint of step 2
def test_a_step_taken_anew_is_that_of_the_run(
    run: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(capsys, run, step)
    origin = {2: "the start of the run", 3: "checkpoint 2"}[step]
    assert f"from {origin}\n" in out
    (line,) = [line for line in read_metrics(run) if line["step"] == step]
    assert f"{line['loss']:.9g}" in out.split()  # 9 digits tell one float32 from another
    assert "\nto the bit\n" in out
    assert "Dense_0/kernel" in out


def test_the_operation_that_went_bad(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((run / "run.json").read_text())
    record["sessions"][0]["versions"]["numpy"] = "1.0"
    before = (run / "run.json").read_text()
    (run / "run.json").write_text(json.dumps(record))
    out = said(capsys, run, 4, "--check")
    (run / "run.json").write_text(before)
    assert "not to the bit as in the run: numpy changed since" in out
    assert "first operation that goes bad is log, in the forward pass" in out
    assert "  of    Net/loudness\n" in out
    number = next(i for i, line in enumerate(FILE.splitlines(), 1) if "# of nothing" in line)
    assert f"experiment.py:{number} in Loudness.__call__: return x + jnp.log(" in out
    assert "  from  float32[8,1] from 0 to " in out
    assert "  makes float32[8,1]: 1 inf of 8" in out
    gradient = next(line for line in out.splitlines() if line.startswith("gradient norm"))
    assert gradient.split()[-1] == "nan"


def test_a_step_after_the_parameters_went_bad(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(capsys, run, 5, "--check")
    assert "the State was not finite any more after step 4, where" in out
    assert "first operation that goes bad is log, in the forward pass" in out


def test_what_cannot_be_replayed(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 14 steps: there is no step 15"):
        replay.main([str(run), "15"])
    with pytest.raises(UserError, match="is not the folder of a run"):
        replay.main([str(tmp_path), "1"])
    for words, message in (
        (["0"], "expected at least 1"),
        (["x"], "invalid int value"),
        (["3", "--offset", "-1"], "expected 0 or more"),
    ):
        with pytest.raises(UserError, match=message):
            replay.parse([str(run), *words])


def test_a_step_within_a_call_and_before_a_roll_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.py").write_text(FILE)
    words = ["rollback=yes", "steps_per_call=3", "save_every.count=3"]
    with pytest.raises(RunFailed, match="at step 11, after 1 roll-backs"):
        session.run(load(tmp_path / "file.py", words), tmp_path / "run", False, None)
    capsys.readouterr()
    out = said(capsys, tmp_path / "run", 2)
    assert "the run took 3 steps at once, and the 1 before this one" in out
    assert "there is no checkpoint before step 2" in out
    out = said(capsys, tmp_path / "run", 5)  # batch 4, after the checkpoint of step 3
    assert "the run rolled back after this step, and may have taken it again: --offset 1" in out
    again = said(capsys, tmp_path / "run", 5, "--offset", 1)
    assert "rolled back" not in again
    assert again != out


# The culprit


def find(function: Any, *args: Any) -> culprit.Culprit | None:
    return culprit.find(function, *(jnp.asarray(a, jnp.float32) for a in args))


def test_an_operation_of_a_derivative() -> None:
    found = find(jax.grad(lambda x: jnp.sum(jnp.sqrt(x))), [1.0, 0.0])
    assert found is not None and found.operation in ("div", "rsqrt")  # 1 / (2 sqrt(0))
    assert found.outputs == ("float32[2]: 1 inf of 2",)
    assert "test_replay.py" in found.place and "jnp.sqrt(x)" in found.place


def test_a_bad_number_that_goes_nowhere_is_none() -> None:
    assert find(lambda x: jnp.where(x > 0, jnp.log(x), 0.0), [1.0, 0.0]) is None
    masked = find(lambda x: jax.nn.softmax(jnp.where(x > 0, x, -jnp.inf)), [1.0, 0.0])
    assert masked is None


def test_the_first_counts_and_where_the_masked_came_from() -> None:
    # the gradient of what is masked is 0 times infinity
    found = find(jax.grad(lambda x: jnp.sum(jnp.where(x > 0, jnp.log(x), 0.0))), [1.0, 0.0])
    assert found is not None and found.operation == "div"
    found = find(lambda x: jnp.exp(x) + jnp.log(x - x), [100.0, 1.0])
    assert found is not None and found.operation == "exp"


def test_nan_of_an_infinity_that_was_put_there() -> None:
    found = find(lambda x: jnp.sum(jax.nn.softmax(jnp.where(x > 5, x, -jnp.inf))), [1.0, 0.0])
    assert found is not None and found.operation == "sub"  # -inf - -inf
    with pytest.raises(ValueError, match="finite arguments"):
        find(jnp.sin, [np.nan])


def loop(x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, jnp.int32(x[0]), lambda i, x: jnp.log(x), x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jax.lax.scan(lambda c, _: (jnp.log(c), c), x, length=4)[0],
        lambda x: jax.lax.scan(lambda c, y: (c, jnp.log(y - 3)), 0.0, x, reverse=True)[1],
        loop,
        lambda x: jax.lax.cond(x[0] > 1, lambda x: jnp.log(-x), jnp.sin, x),
        jax.checkpoint(lambda x: jnp.log(-x)),
        jax.jit(lambda x: jax.vmap(lambda x: jnp.log(x - 3))(x)),
    ],
    ids=["scan", "scanned", "while", "cond", "remat", "jit"],
)
def test_inside_what_contains_operations(function: Any) -> None:
    found = find(function, [4.0, 3.0])
    assert found is not None and found.operation == "log"
