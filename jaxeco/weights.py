"""A run's weights as one file, for use elsewhere: python -m jaxeco.weights RUN -o FILE [options]"""

import argparse
from pathlib import Path

from jaxeco import command
from jaxeco.errors import UserError


def parse(words: list[str]) -> argparse.Namespace:
    parser = command.Parser(prog="python -m jaxeco.weights", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run's folder, such as runs/digits_mlp")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    which = "best, newest or a step (default: the best, if any)"
    add("--checkpoint", type=command.checkpoint, help=which)
    add("--only", metavar="PART", help='of the parameters only those below PART, such as "lora"')
    add("--merge-lora", action="store_true", help="add the adaptation of Lora to its base")
    options = parser.parse_args(words)
    if options.output.suffix != ".safetensors":
        parser.error(f"-o {options.output}: expected a name that ends in .safetensors")
    if options.only and options.merge_lora:
        parser.error("--merge-lora leaves one part only: leave out --only")
    return options


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    options = parse(words)
    from jaxeco import folder, pretrained, trees  # from here on JAX is awake
    from jaxeco.models.lora import Lora

    experiment = folder.open_run(options.run).experiment
    weights = pretrained.read(options.run, options.checkpoint)
    arrays = weights.arrays
    if options.merge_lora:
        if not isinstance(experiment.model, Lora):
            raise UserError(f"{options.run} has no Lora to merge: leave out --merge-lora")
        arrays = trees.named(experiment.model.merged(trees.nested(arrays)))
    if options.only:
        part = options.only.rstrip("/") + "/"
        arrays = {name: array for name, array in arrays.items() if name.startswith(part)}
        if not arrays:
            parts = dict.fromkeys(name.partition("/")[0] for name in weights.arrays)
            raise UserError(
                f"--only {options.only}: {weights.origin} has no such part; it has"
                f" {', '.join(parts)}"
            )
    metadata = {"experiment": experiment.name, "step": str(weights.step)}
    if weights.tokenizer is not None:
        metadata["tokenizer"] = weights.tokenizer
    if isinstance(experiment.model, Lora):
        metadata["lora_alpha"] = str(experiment.model.alpha)
    trees.write(options.output, arrays, metadata)
    numbers = sum(array.size for array in arrays.values())
    print(f"{options.output}: {numbers:,} numbers in {len(arrays)} arrays, of {weights.origin}")
    return 0


if __name__ == "__main__":
    command.start(main)
