"""What an experiment file claims to reach, as data: `CLAIMS`, which `jaxeco.reproduce` runs again.

Standard library only, so that an experiment file stays light.
"""

import runpy
from dataclasses import KW_ONLY, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal

from jaxeco.config import Loaded, load
from jaxeco.errors import UserError


@dataclass(frozen=True)
class Claim:
    """A metric, and what runs of the file came to: mean ± sd over n seeds.

    Attributes:
      metric: such as "test/accuracy"; a share, as an accuracy is, is a fraction of 1.
      mean, sd: to the last digit that is claimed; sd: over n - 1, None of one run.
      n: runs, which differed in their seeds alone.
      device: what they ran on.
      words: of the command line, such as "batch=500".
      at: "last": at the end of a run; "best": at its best evaluation, by the experiment's `best`.
      unit: of the mean, such as "nats a character".
      takes: how long a run is, from the start to the end of its process.
      data: what is not usual about the data.
      after: "start=docs_bpe.py": the argument `start` is the folder of that file's run with the
        same seed.
      tolerance: how far a run may be from the mean, where neither it nor the claim has an sd.
    """

    metric: str
    mean: float
    sd: float | None = None
    _: KW_ONLY
    n: int
    device: str
    words: tuple[str, ...] = ()
    at: Literal["last", "best"] = "last"
    unit: str = ""
    takes: str = ""
    data: str = ""
    after: str = ""
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"n={self.n!r}: expected a number of runs")
        if (self.sd is None) != (self.n == 1) or (self.sd is not None and not self.sd >= 0):
            raise ValueError(f"sd={self.sd} of n={self.n} runs: one run has none, more have one")
        if (self.tolerance is None) != (self.n > 1):
            wrong = f"tolerance={self.tolerance} of n={self.n} runs"
            raise ValueError(f"{wrong}: one run needs a tolerance, more have their sd")
        if self.at not in ("last", "best"):
            raise ValueError(f"at={self.at!r}: expected last or best")
        if not all(self.metric.partition("/")):
            raise ValueError(f"metric={self.metric!r}: expected one such as test/accuracy")
        if self.after and not all(self.after.partition("=")):
            raise ValueError(f"after={self.after!r}: expected argument=FILE")
        if any(word.startswith("seed=") for word in self.words):
            raise ValueError(f"words={self.words}: leave out the seed, which differs")

    @property
    def percent(self) -> bool:
        return is_share(self.metric)

    @property
    def rounding(self) -> float:
        """Half a unit of the last digit that is claimed."""
        return 0.5 * 10.0**-self._decimals

    @property
    def digits(self) -> int:
        """Behind the point of what is shown."""
        return max(0, self._decimals - 2 * self.percent)

    @property
    def value(self) -> str:
        """97.31 ± 0.16 %, with the digits that are claimed."""
        numbers = [self.mean] if self.sd is None else [self.mean, self.sd]
        scale = 100 if self.percent else 1
        said = " ± ".join(f"{scale * number:.{self.digits}f}" for number in numbers)
        return said + " %" * self.percent

    @property
    def _decimals(self) -> int:
        written = [Decimal(repr(x)) for x in (self.mean, self.sd) if x is not None]
        return max(0, *(-int(number.as_tuple().exponent) for number in written))

    def __str__(self) -> str:
        unit = f" {self.unit}" * bool(self.unit)
        return f"{self.metric} {self.value}{unit} (n = {self.n})"


def is_share(metric: str) -> bool:
    """Whether a metric is read as a percentage, as the log shows it."""
    name = metric.rpartition("/")[2]
    return "accuracy" in name or name.startswith("top")


def read(path: Path) -> tuple[Loaded, tuple[Claim, ...]]:
    """An experiment file, as it is without words, and its `CLAIMS`.

    Raises:
      UserError: it does not load, or its claims are none.
    """
    loaded = load(path)  # complains of what is wrong with the file
    names = runpy.run_path(str(path))
    if "CLAIMS" not in names:
        raise UserError(f"{path} has no CLAIMS: expected CLAIMS = (Claim(...),), or () for none")
    claims = names["CLAIMS"]
    if not isinstance(claims, tuple) or not all(isinstance(claim, Claim) for claim in claims):
        raise UserError(f"{path}: CLAIMS is {claims!r}: expected a tuple of Claim")
    return loaded, claims
