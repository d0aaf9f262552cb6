"""Writes text with a run's language model: python -m jaxeco.sample RUN --prompt TEXT [options]"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxeco import command
from jaxeco.errors import UserError

if TYPE_CHECKING:
    from jaxeco.generate import Piece


def parse(words: list[str]) -> argparse.Namespace:
    parser = command.Parser(
        prog="python -m jaxeco.sample",
        description=__doc__,
        epilog="The text goes to standard output, all else to standard error. A text that is longer"
        " than the model's context goes on from the last half of it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run's folder, such as runs/shakespeare_char")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--prompt", metavar="TEXT", help="how the text begins (default: anew)")
    start.add_argument("--prompt-file", type=Path, metavar="FILE", help="the same, from a file")
    add("--tokens", type=int, default=500, metavar="N", help="at most, if no text ends (500)")
    add("--samples", type=int, default=1, metavar="N", help="texts, written at the same time (1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends before it; repeatable")
    add("--temperature", type=float, default=1.0, metavar="T", help="(1); 0: the likeliest token")
    add("--top-k", type=int, metavar="K", help="of the K likeliest tokens only")
    add("--top-p", type=float, metavar="P", help="of the fewest that are P likely together")
    add("--min-p", type=float, metavar="P", help="of those P times as likely as the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeats less")
    add("--seed", type=int, default=0, help="another one, another text (%(default)s)")
    which = "best, newest or a step (default: the best, if any)"
    add("--checkpoint", type=command.checkpoint, help=which)
    options = parser.parse_args(words)
    for name in ("tokens", "samples"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name} {value}: expected at least 1")
    if "" in options.stop:
        parser.error("--stop '': expected a text")
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed {options.seed}: expected 0 <= seed < 2**32")
    return options


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    options = parse(words)
    prompt = options.prompt or ""
    if options.prompt_file is not None:
        prompt = _read(options.prompt_file)
    from jaxeco import folder, generate, pretrained, trees  # from here on JAX is awake
    from jaxeco.data.tokenizers import load_tokenizer

    try:
        sampling = generate.Sampling(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    model = folder.open_run(options.run).experiment.model
    try:
        generate.check_model(model)
    except ValueError as error:
        raise UserError(f"{options.run} cannot write text: {error}") from error
    tokenizer = load_tokenizer(options.run / folder.TOKENIZER)
    length = len(generate.prompt_tokens(tokenizer, prompt))
    weights = pretrained.read(options.run, options.checkpoint)
    if weights.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{options.run / folder.TOKENIZER} is {tokenizer.fingerprint}, but {weights.origin} was"
            f" trained with tokenizer {weights.tokenizer}: put that one there"
        )
    params = trees.nested(weights.arrays)
    _check_shapes(model, params, weights.origin)
    if length > model.context:
        _say(
            f"the prompt has {length:,} tokens, the context {model.context:,}: only the last"
            f" {model.context // 2:,} are read"
        )
    pieces = generate.stream(
        model,
        params,
        tokenizer,
        [prompt] * options.samples,
        tokens=options.tokens,
        sampling=sampling,
        seed=options.seed,
        stop=options.stop,
    )
    return _show(pieces, [prompt] * options.samples, weights.origin)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the prompt {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt {path} is not text in UTF-8: {error}") from error


def _check_shapes(model: Any, params: Any, origin: str) -> None:
    """Raises UserError unless the parameters are those of the model."""
    import jax
    import numpy as np

    text_1x1 = np.zeros((1, 1), np.int32)
    wanted = jax.eval_shape(lambda: model.init(jax.random.key(0), text_1x1, train=False))["params"]
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, wanted):
        raise UserError(
            f"{origin} has other parameters than the model of its experiment.py: restore the code"
            " that it was trained with"
        )


def _show(pieces: "Iterator[list[Piece]]", prompts: list[str], origin: str) -> int:
    """Prints the texts as they come, then what they took; returns the exit status."""
    from jaxeco.interrupt import Interrupt

    tokens, compiled = 0, (0, 0.0)  # compiled: tokens there were, and the time, when all was
    with Interrupt() as interrupt:
        try:
            page = _Page(prompts)
            for row in pieces:
                page.add(row)
                compiled = compiled if tokens else (sum(p.tokens for p in row), time.monotonic())
                tokens += sum(piece.tokens for piece in row)
                if interrupt.asked():
                    break
            page.close()
        except BrokenPipeError:  # nobody reads any more, as behind `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise UserError(f"cannot write the text: {error.strerror}") from error
    rate = ""
    if tokens > compiled[0]:
        per_second = (tokens - compiled[0]) / (time.monotonic() - compiled[1])
        rate = f", {per_second:,.0f} tokens/s once compiled"
    _say(f"{tokens:,} tokens{rate}; {origin}")
    return interrupt.exit_status if interrupt.signal else 0


class _Page:
    """Texts on standard output, one below the other: each waits until those above it are done."""

    def __init__(self, beginnings: list[str]):
        self.waiting = list(beginnings)
        self.done = [False] * len(beginnings)
        self.at = 0
        self._title()
        self._print()

    def add(self, row: "list[Piece]") -> None:
        for b, piece in enumerate(row):
            self.waiting[b] += piece.text
            self.done[b] = piece.done
        self._print()

    def close(self) -> None:
        self.done = [True] * len(self.done)
        self._print()

    def _print(self) -> None:
        while self.at < len(self.waiting):
            done = self.done[self.at]
            print(self.waiting[self.at], end="\n" if done else "", flush=True)
            self.waiting[self.at] = ""
            if not done:
                return
            self.at += 1
            self._title()

    def _title(self) -> None:
        if self.at < len(self.waiting) and len(self.waiting) > 1:
            print(f"--- {self.at + 1} of {len(self.waiting)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    command.start(main)
