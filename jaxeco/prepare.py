"""Prepares a data set of tfds before a run needs it: python -m jaxeco.prepare NAME [options]

Needed only where a builder uses Apache Beam; docs/data.md says how, on one machine and on many.
"""

import argparse
import sys
from pathlib import Path

from jaxeco import command


def parse(words: list[str]) -> argparse.Namespace:
    parser = command.Parser(prog="python -m jaxeco.prepare", description=__doc__)
    add = parser.add_argument
    add("name", metavar="NAME", help="as tfds spells it, such as cifar10 or wikipedia/20230601.en")
    add("--data-dir", type=Path, metavar="DIR", help="default: $TFDS_DATA_DIR")
    add(
        "--beam-pipeline-options",
        metavar="KEY=VALUE,...",
        help="of Apache Beam, such as runner=DirectRunner,direct_num_workers=8",
    )
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    options = parse(words)
    from jaxeco.data import tfds

    text = options.beam_pipeline_options
    beam = None if text is None else [f"--{option}" for option in text.split(",") if option]
    title, folder = tfds.prepared(options.name, options.data_dir, beam)
    print(f"{title} is at {folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    command.start(main)
