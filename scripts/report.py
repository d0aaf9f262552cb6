"""Sections of a document that a script writes: what stands between two markers, each on a line.

<!-- NAME: begin -->
<!-- NAME: end -->
"""

import re
from pathlib import Path

from jaxeco.errors import UserError


def write_section(path: Path | str, name: str, markdown: str) -> None:
    """Replaces what stands between the markers of section `name` in the file at `path`.

    Raises:
      UserError: not exactly one such pair of markers stands there.
    """
    Path(path).write_text(with_section(path, name, markdown))


def with_section(path: Path | str, name: str, markdown: str) -> str:
    """What the file would be after `write_section`."""
    text = Path(path).read_text()
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    sections = list(re.finditer(f"^{begin}$.*?^{end}$", text, re.DOTALL | re.MULTILINE))
    if len(sections) != 1 or text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(
            f"{path}: expected the line {begin} once, and after it {end} once: put them where the"
            " section belongs"
        )
    (section,) = sections
    written = f"{begin}\n\n{markdown.strip()}\n\n{end}"
    return text[: section.start()] + written + text[section.end() :]
