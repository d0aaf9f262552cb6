"""verify: true promises are found true, and each broken one is found broken."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxeco import config, verify
from jaxeco.data.dataset import Dataset

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "experiments" / "digits_mlp.py"
TINY = ("widths=8", "dropout=0", "batch=16", "epochs=1", "eval_batch=90")
# what is compiled is used for a few steps only
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def tiny(**changes):
    ex = config.load(DIGITS, TINY).experiment
    return dataclasses.replace(ex, **changes)


def levels(rows) -> dict[str, str]:
    return {row.what: row.level for row in rows}


def test_the_command(tmp_path) -> None:
    """A CPU alone plays several; nothing is left behind."""
    environment = os.environ | {"XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "jaxeco.verify", str(DIGITS), *TINY, "--steps=5", "--devices=2"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    assert said.startswith("one CPU device: it plays 2")
    assert "digits_mlp: 4 steps on 2 x cpu, float32" in said
    rows = [line for line in said.splitlines() if line.startswith(("ok", "failed", "not tried"))]
    for what in ("resumed = uninterrupted", "streamed = resident", "as on 1: evaluation of"):
        assert any(line.startswith("ok") and what in line for line in rows), said
    for layout in ("jit data:2", "shard_map data:2", "pmap data:2", "jit fsdp:2", "jit tensor:2"):
        assert any(line.startswith("ok") and f"as on 1: {layout}" in line for line in rows)
    assert next(line for line in rows if "sequence:2" in line).startswith("not tried")
    assert list(tmp_path.iterdir()) == []


def by_place_in_the_shard(keys, batch):
    """An augmentation that forgets that a device sees a part of the batch."""
    factors = jax.numpy.arange(len(batch["x"])) / 8
    return batch | {"x": batch["x"] * factors[:, None, None, None]}


def test_finds_a_step_that_depends_on_the_number_of_devices(monkeypatch) -> None:
    ex = tiny(augment=(by_place_in_the_shard,), evals={}, best=None)
    wanted = {"jit data:2", "shard_map data:2"}  # the others cost time
    real = verify.layouts
    some = lambda ex, n, _: (pair for pair in real(ex, n) if pair[0] in wanted)  # noqa: E731
    monkeypatch.setattr(verify, "layouts", some)
    rows = list(verify.many(ex, jax.devices()[:2], 4, 1e-5))
    assert levels(rows) == {
        "as on 1: jit data:2": "ok",
        "as on 1: shard_map data:2": "failed",
    }
    assert "more than 1e-05 from step 1 on" in rows[1].text


class Moody:
    """A source that gives other examples whenever it is read."""

    def __init__(self) -> None:
        self.reads = itertools.count()
        self.shape, self.dtype = (64, 4), np.dtype(np.float32)

    def __getitem__(self, indices):
        return np.full((*np.shape(indices), 4), next(self.reads), np.float32)

    def open(self) -> Dataset:
        fields = {"x": self, "y": np.zeros(64, np.int32)}
        return Dataset(fields, (), "moody", fingerprint=str(id(self)))


def test_finds_data_that_changes(tmp_path) -> None:
    ex = tiny(train=Moody(), evals={}, preprocess=(), resident_gib=0.0, best=None)
    one = jax.devices()[:1]
    assert verify.streamed(ex, one, 2).level == "failed"
    found = levels(verify.resumed(ex, one, 4, tmp_path))
    assert found == {
        "resumed = uninterrupted: State": "failed",
        "resumed = uninterrupted: losses": "failed",
    }
    assert verify.streamed(tiny(), one, 2).level == "ok"


def test_comparison_of_losses() -> None:
    reference = np.array([1.0, 2.0, 4.0])
    assert verify.compare(reference * (1 + 5e-6), reference, 1e-5)[0]
    agree, text = verify.compare(np.array([1.0, 2.002, 4.4]), reference, 1e-5)
    assert not agree
    assert text == ("off by 1.0e-01 (step 3); more than 1e-05 from step 2 on; 0.0e+00 at step 1")
    assert not verify.compare(np.array([1.0, np.nan, 4.0]), reference, 1e-5)[0]


def test_what_is_changed_is_said() -> None:
    ex = tiny(batch=21, grad_accum=3, eval_batch=5, steps_per_call=10)
    fitted, steps, notes = verify.fitted(ex, 4, 13)
    assert (fitted.batch, fitted.eval_batch, fitted.steps_per_call, steps) == (12, 4, 2, 12)
    assert notes == [
        "batch=12 instead of 21",
        "eval_batch=4 instead of 5",
        "steps_per_call=2 instead of 10",
    ]
    assert verify.fitted(tiny(), 2, 20)[2] == []


@pytest.mark.parametrize("words", [["--steps", "1"], ["--devices", "1"], ["--devices", "99"]])
def test_mistakes(words) -> None:
    with pytest.raises(verify.UserError, match=r"expected at least 2|there are 8"):
        verify.main([str(DIGITS), *words])


def test_every_mesh_shape_is_a_layout_once() -> None:
    found = [layout.mesh for _, layout in verify.layouts(tiny(), 8, every_mesh=True)]
    shapes = {(m.data, m.fsdp, m.sequence, m.tensor) for m in found}
    assert len(shapes) == 20  # as many as 2^3 can be shared out among four axes
    assert len(found) == 20 + 2  # data:8 is compiled in three ways
