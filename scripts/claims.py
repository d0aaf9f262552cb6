"""Writes into the README what the experiments claim: python scripts/claims.py [--check]

It goes between the lines <!-- claims: begin --> and <!-- claims: end -->. With --check nothing is
written, and the exit status is 1 if the README says something else.
"""

import ast
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from report import with_section, write_section

from jaxeco import command
from jaxeco.claims import Claim, read

ROOT = Path(__file__).parent.parent
HEAD = (
    "| experiment | what it is | result: mean ± sd (n seeds) | a run takes |",
    "| --- | --- | --- | --- |",
)


def table(files: Iterable[Path]) -> str:
    """A row for each experiment, and for each further set of words that it has claims of."""
    return "\n".join([*HEAD, *(row for file in files for row in rows(file))])


def rows(file: Path) -> list[str]:
    _, claims = read(file)
    title = (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()[0].rstrip(".")
    found = []
    for words, group in groupby(claims, lambda claim: claim.words):
        what = "the same" if found else title
        if words:
            what += f", with `{' '.join(words)}`"
        found.append(row(f"[{file.stem}](experiments/{file.name})", what, list(group)))
    return found


def row(name: str, what: str, claims: list[Claim]) -> str:
    results = "; ".join(
        ", ".join(map(said, group)) + f" ({notes})" for notes, group in groupby(claims, noted)
    )
    takes = ", ".join(dict.fromkeys(f"{c.takes} on a {c.device}".strip() for c in claims))
    return f"| {name} | {what} | {results} | {takes} |"


def said(claim: Claim) -> str:
    split, _, metric = claim.metric.partition("/")
    return f"{split} {metric.replace('_', ' ')} {claim.value} {claim.unit}".rstrip()


def noted(claim: Claim) -> str:
    best = "at the best step" if claim.at == "best" else ""
    return ", ".join(filter(None, [f"n = {claim.n}", best, claim.data]))


def main(words: list[str]) -> int:
    parser = command.Parser(prog="python scripts/claims.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would differ")
    parser.add_argument("--file", type=Path, default=ROOT / "README.md", help="(%(default)s)")
    options = parser.parse_args(words)
    written = table(sorted((ROOT / "experiments").glob("*.py")))
    if not options.check:
        write_section(options.file, "claims", written)
        return 0
    same = with_section(options.file, "claims", written) == options.file.read_text()
    print(f"{options.file} is up to date" if same else f"{options.file}: run scripts/claims.py")
    return int(not same)


if __name__ == "__main__":
    command.start(main)
