"""What a run is, for its checkpoints and its record, and what it has come to."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxeco import folder as folders
from jaxeco import hosts
from jaxeco.description import describe
from jaxeco.experiment import IDENTITY, Experiment
from jaxeco.log import PACE, Log
from jaxeco.plan import Plan, fingerprint

Row = Sequence[str]
# How a run's latest session came to its end: as planned; by `patience`; by a sweep that stopped it;
# because its loss was not finite; by a signal or --steps, to go on later.
Ended = Literal["complete", "stalled", "stopped", "diverged", "interrupted"]


def identity(p: Plan) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued: all that determines the State."""
    resolved = describe(p.ex)
    data = {"data": p.train.fingerprint, "tokenizer": fingerprint(p.train.tokenizer)}
    return {name: resolved[name] for name in IDENTITY} | data


def environment(p: Plan) -> dict[str, Any]:
    """What a session ran on and with; all processes ask together."""
    measures = (*p.ex.metrics, *p.ex.eval_metrics)
    return {
        "hosts": hosts.gather(platform.node()),
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in p.mesh.devices.flat],
        "lower_is_better": ["loss", *(m.name for m in measures if m.lower_is_better)],
        "data": {
            name: {
                "name": data.name,
                "examples": data.eval_examples,
                "fingerprint": data.fingerprint,
                "classes": list(data.classes),
                "fields": {k: f"{f.dtype}{list(f.shape[1:])}" for k, f in data.fields.items()},
            }
            for name, data in {"train": p.train, **p.evals}.items()
        },
    }


def finish(p: Plan, step: int, metrics: list[dict], folder: Path, log: Log, ended: str) -> None:
    """The end table, and result.json: each split's latest line, and those of the best step.

    What stands under "train" was measured while training, since the log's last line.
    """
    latest = {line["split"]: line for line in metrics}
    rows: list[Row] = [("split", "step", "metric", "value")]
    result: dict[str, Any] = {"step": step, "of": p.steps, "ended": ended, "seed": p.ex.seed}
    for split, line in latest.items():
        rows += [
            (split, f"{line['step']:,}", k, f"{v:.4f}" if isinstance(v, float) else f"{v:,}")
            for k, v in scalars(line).items()
        ]
        result[split] = {"step": line["step"], **scalars(line)}
    if p.ex.best and (found := best(p.ex, metrics)):
        result["best"] = found
        rows.append(("best", f"{found['step']:,}", p.ex.best, f"{found[p.ex.best]:.4f}"))
    result["seconds"] = metrics[-1]["time"] if metrics else 0.0
    folders.write_result(folder, result)
    log.table(f"{p.ex.name} after {step:,} of {p.steps:,} steps, {result['seconds']:.1f} s", rows)


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Of a line of the log what is a result: numbers."""
    values = {name: v for name, v in line.items() if isinstance(v, int | float)}
    return {name: v for name, v in values.items() if not PACE.fullmatch(name)}


def best(ex: Experiment, metrics: list[dict]) -> dict[str, float]:
    """The step that is best by `ex.best`, the newest of equals, and what was measured at it.

    It is the step whose checkpoint is kept as the best; {} if nothing has been measured.
    """
    split, _, metric = str(ex.best).rpartition("/")
    sign = 1 if ex.best_mode == "max" else -1
    scores = [
        (sign * line[metric], line["step"])
        for line in metrics
        if line["split"] == split and np.isfinite(line[metric])
    ]
    if not scores:
        return {}
    step = max(scores)[1]
    found = {
        f"{line['split']}/{name}": value
        for line in metrics
        if line["step"] == step and line["split"] in ex.evals
        for name, value in scalars(line).items()
    }
    return {"step": step} | found
