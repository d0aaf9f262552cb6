"""HTML in which what is read from files cannot become markup: what is not Markup is escaped."""

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

EMPTY = ("img", "input", "br")  # elements that hold nothing and have no end


class Markup(str):
    """HTML already."""


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """<name attributes>children</name>.

    Children that are no Markup are escaped, None is left out, an iterable stands for its items. An
    attribute that is True has no value, one that is None or False is left out; `class_` and
    `aria_sort` are written class and aria-sort.
    """
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    given = {key: value for key, value in named.items() if value is not None and value is not False}
    words = "".join(
        f" {key}" if value is True else f' {key}="{html.escape(str(value))}"'
        for key, value in given.items()
    )
    if name in EMPTY:
        return Markup(f"<{name}{words}>")
    return Markup(f"<{name}{words}>{joined(children)}</{name}>")


def joined(children: Iterable[object]) -> Markup:
    """The children one after another, each as `tag` takes it."""
    return Markup("".join(map(_inner, children)))


def _inner(child: object) -> str:
    if isinstance(child, str):
        return child if isinstance(child, Markup) else html.escape(child)
    if isinstance(child, Iterable):
        return joined(child)
    return "" if child is None else html.escape(str(child))


def number(value: float) -> str:
    """As a table shows it: 1,200 or 0.9731 or 3.2e-06."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


@dataclass(frozen=True)
class Cell:
    """What a table shows in a place, and the number that it sorts by there: None comes last."""

    shown: object
    value: float | None


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Iterable[object]],
    *,
    first: tuple[int, str] | None = None,
    **attributes: object,
) -> Markup:
    """A table whose rows can be sorted and filtered where the page's script runs.

    Args:
      head: a name for each column; the first names the rows.
      rows: cells: text, a number, a Cell, or None where there is nothing.
      first: the column that the rows are sorted by, and "ascending" or "descending".
      attributes: of the <table>.
    """
    heads = (
        tag("th", name, scope="col", aria_sort=first[1] if first and first[0] == i else None)
        for i, name in enumerate(head)
    )
    body = (tag("tr", (_cell(cell, i == 0) for i, cell in enumerate(row))) for row in rows)
    whole = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", heads)),
        tag("tbody", body),
        class_="sorts",
        **attributes,
    )
    # a region that takes the focus can be scrolled by keys
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _cell(cell: object, names_row: bool) -> Markup:
    if isinstance(cell, int | float):
        cell = Cell(number(cell), cell if math.isfinite(cell) else None)
    name, scope = ("th", "row") if names_row else ("td", None)
    if isinstance(cell, Cell):
        value = "" if cell.value is None else cell.value
        return tag(name, cell.shown, scope=scope, class_="number", data_value=value)
    return tag(name, cell, scope=scope)


def embedded_json(data: Any) -> Markup:
    """`data` as JSON to stand in a <script>: nothing in it can end that, or begin a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026"))


def page(skeleton: str, parts: Mapping[str, str], script: str) -> str:
    """A page that may run `script` and nothing else, and may load nothing.

    Args:
      skeleton: with $name for each of `parts`, and $script and $allowed.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    allowed = f"default-src 'none'; {allowed}"
    return Template(skeleton).substitute(parts, script=script, allowed=allowed)
