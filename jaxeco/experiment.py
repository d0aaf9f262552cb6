"""What an experiment is: a frozen description from which, with nothing else, a run follows.

Standard library only, so that reading and checking an experiment wakes nothing up.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

from jaxeco.trackers import Tracker

if TYPE_CHECKING:
    import flax.linen as nn

    from jaxeco.data.dataset import Source
    from jaxeco.losses import Loss
    from jaxeco.metrics import Metric
    from jaxeco.optim import Optimizer
    from jaxeco.pretrained import Pretrained
    from jaxeco.ranking import WholeSplit


@dataclass(frozen=True)
class Epochs:
    """A stretch of training, in passes over the training data; fractions are allowed."""

    count: float

    def __post_init__(self) -> None:
        if not 0 < self.count < float("inf"):
            raise ValueError(f"Epochs({self.count}): expected a number above 0, not infinite")

    def steps(self, steps_per_epoch: int) -> int:
        return max(1, round(min(self.count * steps_per_epoch, 2.0**53)))  # float: maybe infinite


@dataclass(frozen=True)
class Steps:
    """A stretch of training, in steps of the optimizer."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"Steps({self.count}): expected at least 1")

    def steps(self, steps_per_epoch: int) -> int:
        return self.count


@dataclass(frozen=True)
class MeshShape:
    """How many devices share each part of the work; written data:2,fsdp:2,tensor:2.

    Attributes:
      data: parts of the batch; None: what the other axes leave of the devices.
      fsdp: parts of the batch, too, and of parameters and optimizer state (Rajbhandari et al. 2020,
        ZeRO stage 3): each device holds a part of them, and asks the others when it needs the rest.
      sequence: parts of each text, for transformers.
      tensor: parts of each layer: heads, units of the MLP, features (Shoeybi et al. 2019).
    """

    data: int | None = None
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if (value is not None or f.default is not None) and not _whole(value):
                raise ValueError(f"{f.name}:{value}: expected a whole number of at least 1")

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """Reads "data:2,fsdp:4"; raises ValueError where it cannot."""
        sizes = _numbers(text.split(","), {f.name: int for f in fields(cls)})
        return cls(**sizes)

    def __str__(self) -> str:
        """As it is written; axes of one device are left out."""
        sizes = {f.name: getattr(self, f.name) for f in fields(self)}
        return ",".join(f"{name}:{n}" for name, n in sizes.items() if n not in (None, 1))


@dataclass(frozen=True)
class Guard:
    """What becomes of a step that goes bad; written skip, or rollback,factor:10,limit:3.

    Attributes:
      then: "skip": the step leaves all as it was, but counts; "rollback": the run returns to its
        last checkpoint before it, and passes over the batches up to and with that of the bad step.
      factor: a loss of so many times its running average is bad, too; None: only where the loss,
        the gradient or the update is not finite.
      limit: how often in a run; then the run ends, as it does without a guard.
    """

    then: Literal["skip", "rollback"]
    factor: float | None = None
    limit: int = 10

    def __post_init__(self) -> None:
        if self.then not in ("skip", "rollback"):
            near = difflib.get_close_matches(str(self.then), ("skip", "rollback"), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{self.then!r}: expected skip or rollback{hint}")
        if self.factor is not None and not 1 < self.factor < float("inf"):
            raise ValueError(f"factor:{self.factor}: expected a number above 1")
        if not _whole(self.limit):
            raise ValueError(f"limit:{self.limit}: expected a whole number of at least 1")

    @classmethod
    def parse(cls, text: str) -> Guard:
        """Reads "rollback,factor:10,limit:3"; raises ValueError where it cannot."""
        then, *words = text.split(",")
        options = _numbers(words, {"factor": float, "limit": int})
        return cls(then.strip(), **options)  # type: ignore[arg-type]  # it checks its fields

    def __str__(self) -> str:
        """As it is written."""
        factor = "" if self.factor is None else f",factor:{self.factor:g}"
        return f"{self.then}{factor},limit:{self.limit}"


class Calibration(Protocol):
    """Sets parameters before step 0 by the first examples of the training data."""

    @property
    def examples(self) -> int: ...

    def __call__(self, params: Any, x: Any, /) -> Any:
        """The parameters anew; `x` is what the model is given of them, a numpy array."""


class Views(Protocol):
    """Versions of the model's input whose outputs stand for the input's, averaged."""

    @property
    def weights(self) -> tuple[float, ...]:
        """How much each counts; the sum is 1."""

    def __call__(self, x: Any, /) -> Any:
        """From x [B, ...] to its V versions, [B, V, ...]."""


def _numbers(words: Iterable[str], kinds: Mapping[str, type]) -> dict[str, Any]:
    """{"data": 2} of ["data:2"]; raises ValueError where it is not that."""
    found: dict[str, Any] = {}
    for word in words:
        name, _, text = word.strip().partition(":")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(kinds)}"
            raise ValueError(f"no {name!r} here; {hint}")
        if name in found:
            raise ValueError(f"{name} is given twice")
        try:
            found[name] = kinds[name](text)
        except ValueError:
            example = f"{name}:{2 if kinds[name] is int else 10}"
            raise ValueError(f"{word.strip()!r}: expected a number, such as {example}") from None
    return found


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# marks a field that may differ between a checkpoint and the run that continues from it
FREE = {"identity": False}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything a run depends on; with `seed` it determines every bit of the result."""

    name: str = field(metadata=FREE)  # names the run's folder: runs/<name>
    seed: int = 0  # of initialisation, data order, augmentation and dropout

    train: Source = field(metadata=FREE)  # what is learnt from; a checkpoint keeps its fingerprint
    evals: Mapping[str, Source] = field(metadata=FREE)  # what is measured on, by name
    preprocess: tuple[Callable[[dict], dict], ...] = ()  # on every batch, in the compiled step
    augment: tuple[Callable[[Any, dict], dict], ...] = ()  # then, in training: (keys_B, batch)
    # then, in evaluation; an example's key is a function of its number in the split
    eval_augment: tuple[Callable[[Any, dict], dict], ...] = field(default=(), metadata=FREE)
    # then, in the evaluation on some of `evals`, by name: averages the outputs for several views
    views: Mapping[str, Views] = field(default_factory=dict, metadata=FREE)

    model: nn.Module
    start_from: Pretrained | None = None  # parameters to begin with, instead of random ones
    calibrate: Calibration | None = None  # then: sets some of them by the training data
    loss: Loss
    eval_loss: Loss | None = field(default=None, metadata=FREE)  # in evaluation; None: `loss`
    metrics: tuple[Metric, ...] = field(default=(), metadata=FREE)  # beside the loss
    # in evaluation only
    eval_metrics: tuple[Metric | WholeSplit, ...] = field(default=(), metadata=FREE)

    optimizer: Optimizer
    batch: int  # examples per step, over all devices
    length: Epochs | Steps
    clip_norm: float | None = None  # longest gradient, as a global norm
    guard: Guard | None = None  # against steps that go bad; None: a loss not finite ends the run
    grad_accum: int = 1  # micro-batches that one step's gradient is summed from
    precision: Literal["float32", "bfloat16"] = "float32"  # of the forward and backward pass

    # how a step meets the devices
    mesh: MeshShape = field(default=MeshShape(), metadata=FREE)
    parallel: Literal["jit", "shard_map", "pmap"] = field(default="jit", metadata=FREE)
    steps_per_call: int = field(default=1, metadata=FREE)  # above 1 where a step is very short
    resident_gib: float = field(default=4.0, metadata=FREE)  # smaller data lies on the devices
    read_workers: int = field(default=0, metadata=FREE)  # processes that decode; 0: threads do

    eval_batch: int = field(default=1000, metadata=FREE)  # examples per evaluation step
    eval_every: Epochs | Steps = field(default=Epochs(1), metadata=FREE)
    save_every: Epochs | Steps = field(default=Epochs(1), metadata=FREE)
    log_every: Epochs | Steps = field(default=Steps(50), metadata=FREE)
    keep: int = field(default=2, metadata=FREE)  # newest checkpoints that stay
    best: str | None = field(default=None, metadata=FREE)  # and the best by, say, "test/accuracy"
    # evaluations without a better `best` after which the run ends early
    patience: int | None = field(default=None, metadata=FREE)
    # where its scalars go beside metrics.jsonl; None: to TensorBoard, where that is installed
    trackers: tuple[Tracker, ...] | None = field(default=None, metadata=FREE)

    def __post_init__(self) -> None:
        for name in ("batch", "grad_accum", "steps_per_call", "eval_batch", "keep"):
            if not _whole(value := getattr(self, name)):
                raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
        # a number that a program takes as an input passes
        if isinstance(self.clip_norm, int | float) and not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm}: expected a number above 0, or None")
        if self.batch % self.grad_accum:
            raise ValueError(f"batch={self.batch} is not divisible by grad_accum={self.grad_accum}")
        for name, allowed in (
            ("precision", ("float32", "bfloat16")),
            ("parallel", ("jit", "shard_map", "pmap")),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: expected 0 <= seed < 2**32")
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ValueError(f"name={self.name!r}: expected a folder's name")
        for name in ("preprocess", "augment", "eval_augment", "metrics", "eval_metrics"):
            if not isinstance(value := getattr(self, name), tuple):
                kind = type(value).__name__
                raise ValueError(f"{name} is a {kind}: expected a tuple; a comma makes ({kind}(),)")
        if "train" in self.evals:
            raise ValueError("evals: 'train' is the name of the training log; choose another")
        if not self.resident_gib >= 0:
            raise ValueError(f"resident_gib={self.resident_gib}: expected 0 or more")
        if not isinstance(self.read_workers, int) or self.read_workers < 0:
            raise ValueError(f"read_workers={self.read_workers!r}: expected 0 or more processes")
        if unknown := sorted(self.views.keys() - self.evals.keys()):
            raise ValueError(f"views: {unknown[0]!r}: expected one of {', '.join(self.evals)}")
        names = ("loss", *(m.name for m in (*self.metrics, *self.eval_metrics)))
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"metrics: two are called {min(twice)!r}; leave out one of them")
        if not isinstance(self.trackers, tuple | None):
            kind = type(self.trackers).__name__
            raise ValueError(f"trackers is a {kind}: expected a tuple; a comma makes ({kind}(),)")
        labels = [tracker.label for tracker in self.trackers or ()]
        if several := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"trackers: expected one {min(several)}, not several")
        if self.patience is not None and (self.patience < 1 or self.best is None):
            what = f"patience={self.patience}, best={self.best!r}"
            raise ValueError(f'{what}: expected at least 1, and a best, such as "test/loss"')
        if self.best is not None:
            known = [f"{split}/{name}" for split in self.evals for name in names]
            if self.best not in known:
                raise ValueError(f"best={self.best!r}: expected one of {', '.join(known)}")

    @property
    def best_mode(self) -> Literal["max", "min"]:
        """Whether more of `best` is better, or less."""
        name = str(self.best).rpartition("/")[2]
        lower = [m.lower_is_better for m in (*self.metrics, *self.eval_metrics) if m.name == name]
        return "min" if name == "loss" or any(lower) else "max"

    @property
    def resident_bytes(self) -> float:
        return self.resident_gib * 2**30


IDENTITY = tuple(f.name for f in fields(Experiment) if f.metadata.get("identity", True))
