"""What a sweep searches: names with ranges, as text, and as points of the unit cube.

    lr=log(1e-4,1)             a number, evenly over its logarithm
    dropout=uniform(0,0.5)     a number
    layers=int(1,6)            a whole number, both ends included
    width=logint(16,1024)      a whole number, about evenly over its logarithm
    width=choice(64,128,256)   one of these, as they would be written: key=128

A name is what can be written key=value: an argument of the experiment, or a field by its dotted
path. A point of the space becomes such words, so that a trial is a run anyone can start alone.
"""

import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxeco import config
from jaxeco.config import Loaded
from jaxeco.errors import UserError

Value = float | int | str
KINDS = ("log", "uniform", "int", "logint", "choice")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
      log: evenly over their logarithms.
      whole: whole numbers only.

    Raises:
      ValueError: the ends are no such range.
    """

    name: str
    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError("expected two numbers, the lower one first")
        if self.log and self.low <= 0:
            raise ValueError("expected numbers above 0: there is no logarithm of others")
        if self.whole and not (self.low == int(self.low) and self.high == int(self.high)):
            raise ValueError("expected whole numbers")

    @property
    def ends(self) -> tuple[str, ...]:
        """Words for values between which all others lie."""
        return self.word(self.low), self.word(self.high)

    def at(self, u: float) -> Value:
        """The value at 0 <= u < 1, so that even u make what the range promises."""
        low, high = self.low, self.high + self.whole
        if self.log:
            value = math.exp((1 - u) * math.log(low) + u * math.log(high))
        else:
            value = low + u * (high - low)
        value = min(max(value, self.low), self.high)  # rounded beyond an end
        return math.floor(value) if self.whole else value

    def word(self, value: Value) -> str:
        """As it is written on the command line, to the bit."""
        return f"{self.name}={int(value) if self.whole else float(value)!r}"


@dataclass(frozen=True)
class Choice:
    """One of `options`, each as it is written after the name."""

    name: str
    options: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.options) < 2 or "" in self.options:
            raise ValueError("expected two options or more, such as choice(64,128)")
        if len(set(self.options)) < len(self.options):
            raise ValueError("an option is given twice")

    @property
    def ends(self) -> tuple[str, ...]:
        return tuple(self.word(option) for option in self.options)

    def at(self, u: float) -> Value:
        return self.options[int(u * len(self.options))]

    def word(self, value: Value) -> str:
        return f"{self.name}={value}"


Dimension = Range | Choice


def parse(words: Sequence[str]) -> tuple[Dimension, ...]:
    """Reads the words of --space.

    Raises:
      UserError: a word is no name with a range, or a name comes twice.
    """
    dimensions = tuple(_dimension(word) for word in words)
    names = [d.name for d in dimensions]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--space: {min(twice)} is given twice")
    return dimensions


def check(loaded: Loaded, dimensions: Sequence[Dimension]) -> None:
    """Tries the ends of every range, and every choice, alone, as a word of the command line.

    Raises:
      UserError: a name is unknown, or given as key=value as well, or a value does not fit its type
        or is out of range there.
    """
    given = {word.partition("=")[0] for word in loaded.assignments}
    for dimension in dimensions:
        name = dimension.name
        if name in given:
            raise UserError(f"{name} is both given and in --space: leave out one of them")
        if name in ("seed", "name"):
            raise UserError(
                f"--space {name}: not to be searched" + "; see --seeds" * (name == "seed")
            )
        for word in dimension.ends:
            try:
                config.load(loaded.path, [*loaded.assignments, word])
            except UserError as error:
                raise UserError(f"--space {name}: {error}") from error


def grid(dimensions: Sequence[Dimension]) -> list[dict[str, Value]]:
    """All points of a space of choices and of whole numbers; the last name changes fastest.

    Raises:
      UserError: a range has no end of values.
    """
    values: list[Sequence[Value]] = []
    for d in dimensions:
        if isinstance(d, Range) and (d.log or not d.whole):
            raise UserError(
                f"--sampler grid: {d.name} has no end of values; write choice(...) or int(...)"
            )
        options = range(int(d.low), int(d.high) + 1) if isinstance(d, Range) else d.options
        values.append(options)
    names = [d.name for d in dimensions]
    return [dict(zip(names, point)) for point in itertools.product(*values)]


def words(dimensions: Sequence[Dimension], point: Mapping[str, Value]) -> tuple[str, ...]:
    """A point as words of the command line, in the order of the space."""
    return tuple(d.word(point[d.name]) for d in dimensions)


def _dimension(word: str) -> Dimension:
    match = re.fullmatch(r"([\w.]+)=(\w+)\((.*)\)", word.strip())
    if match is None:
        raise UserError(
            f"--space {word}: expected a name and a range, such as 'lr=log(1e-4,1)';"
            " arguments of the experiment stand before --space"
        )
    name, kind, inner = match.groups()
    options = _split(inner)
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(KINDS)}"
        raise UserError(f"--space {word}: no range is called {kind!r}; {hint}")
    try:
        if kind == "choice":
            return Choice(name, options)
        low, high = (float(option) for option in options)
    except ValueError as error:
        why = str(error) if kind == "choice" else f"expected two numbers, such as {kind}(1,8)"
        raise UserError(f"--space {word}: {why}") from error
    try:
        return Range(name, low, high, kind.startswith("log"), kind.endswith("int"))
    except ValueError as error:
        raise UserError(f"--space {word}: {error}") from error


def _split(text: str) -> tuple[str, ...]:
    """Splits at the commas that lie in no bracket: choice((64,32),(128,64)) has two options."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.strip() for part in parts)
