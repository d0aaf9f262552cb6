"""A translation task with exact truth and nothing to download: numbers in English and in German."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxeco.data import order
from jaxeco.data.text import Documents, _at_hand

_ENGLISH = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
_ENGLISH_TENS = (
    "", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"
)  # fmt: skip
_GERMAN = (
    "null", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn",
    "elf", "zwölf", "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn",
    "neunzehn",
)  # fmt: skip
_GERMAN_TENS = (
    "", "", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"
)  # fmt: skip


@dataclass(frozen=True)
class NumberWords:
    """Numbers from 0 to 999,999 in words: "twenty-one thousand", "einundzwanzigtausend".

    Drawn evenly, nine in ten would have six digits. Of three, four, five and six digits "test" has
    200, 600, 600 and 600 numbers, 2,000 in all; "train" has 700, 8,400, 20,400 and 20,400 others
    and all below 100, 50,000 in all. They are chosen and ordered by fixed permutations
    (`order.permutation`), the same for ever and in both languages.

    Attributes:
      split: "train" or "test".
      language: "english", American, without "and"; or "german".
    """

    split: Literal["train", "test"]
    language: Literal["english", "german"]

    def __post_init__(self) -> None:
        for name, allowed in (("split", ("train", "test")), ("language", ("english", "german"))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"NumberWords.{name}: got {value!r}, expected {allowed}")

    def documents(self) -> Documents:
        words = english if self.language == "english" else german
        texts = [words(int(number)) for number in numbers(self.split)]
        return _at_hand(f"numbers in {self.language} {self.split}", texts)


def numbers(split: str) -> np.ndarray:
    """i64[N]: the numbers of a split, in its order."""
    chosen = [np.arange(100 if split == "train" else 0)]
    for digits, test, train in ((3, 200, 700), (4, 600, 8400), (5, 600, 20400), (6, 600, 20400)):
        first = 10 ** (digits - 1)
        dealt = first + order.permutation(0, digits, 9 * first)
        chosen.append(dealt[:test] if split == "test" else dealt[test : test + train])
    together = np.concatenate(chosen)
    return together[order.permutation(0, 0, len(together))]


def english(number: int) -> str:
    """0 <= number < 1,000,000 in American English."""
    thousands, rest = divmod(number, 1000)
    if thousands:
        return f"{english(thousands)} thousand" + (f" {english(rest)}" if rest else "")
    hundreds, rest = divmod(number, 100)
    if hundreds:
        return f"{_ENGLISH[hundreds]} hundred" + (f" {english(rest)}" if rest else "")
    tens, ones = divmod(number, 10)
    if number < 20:
        return _ENGLISH[number]
    return _ENGLISH_TENS[tens] + (f"-{_ENGLISH[ones]}" if ones else "")


def german(number: int) -> str:
    """0 <= number < 1,000,000 in German; 1 is "eins" at the end of a number, else "ein"."""
    return _german(number) + ("s" if number % 100 == 1 else "")


def _german(number: int) -> str:
    thousands, rest = divmod(number, 1000)
    if thousands:
        return f"{_german(thousands)}tausend" + (_german(rest) if rest else "")
    hundreds, rest = divmod(number, 100)
    if hundreds:
        return f"{_GERMAN[hundreds]}hundert" + (_german(rest) if rest else "")
    tens, ones = divmod(number, 10)
    if number < 20:
        return _GERMAN[number]
    return (f"{_GERMAN[ones]}und" if ones else "") + _GERMAN_TENS[tens]
