"""Parameters to start from: those of another run, or of a safetensors file, taken over by name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxeco import checkpoint as checkpoints
from jaxeco import trees
from jaxeco.errors import UserError
from jaxeco.folder import CHECKPOINTS
from jaxeco.models import gpt2
from jaxeco.trees import check_pattern, listed

Which = Literal["best", "newest"] | int | None


@dataclass(frozen=True)
class Weights:
    """Parameters as they lie on disk, and where they come from."""

    arrays: dict[str, np.ndarray]  # by name
    origin: str  # "runs/docs_bpe step 2,000"
    step: int | None = None
    tokenizer: str | None = None  # fingerprint of the tokenizer that they were trained with


@dataclass(frozen=True)
class Report:
    """What came of loading: names of parameters.

    Attributes:
      loaded: now as the source has them.
      fresh: of the model, newly initialised: the source has none, or not of this shape.
      unused: of the source, not in the model.
      misfits: of those that are fresh, what says that shapes differ, and how.
    """

    origin: str
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    misfits: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        """For the table at the start of a run."""
        count = f"{len(self.loaded)} of {len(self.loaded) + len(self.fresh)}"
        rows = [("starts from", f"{count} arrays of {self.origin}")]
        if self.fresh:
            rows.append(("  new", listed(self.fresh)))
        if self.unused:
            rows.append(("  unused", listed(self.unused)))
        if self.misfits:
            rows.append(("  other shape", listed(self.misfits)))
        return rows


@dataclass(frozen=True)
class Pretrained:
    """Where a run's parameters come from before its first step; batch statistics do not.

    Names that the source and the model share are taken over, cast to the model's dtype. GPT-2 as
    Hugging Face publishes it is recognised and renamed (`models/gpt2.py`). A model in `Lora` takes
    over as its base what its own model would.

    Attributes:
      path: a run's folder, or a .safetensors file.
      checkpoint: of a run: "best", "newest" or a step; None: the best, if it has one, or newest.
      rename: (pattern, replacement) pairs, applied by `re.sub` to the source's names, in order.
      fresh: patterns of the model's parameters that stay as initialised, whatever the source has.
      mismatch: what becomes of a parameter whose shape differs: "error", or "fresh".
      lora: for a model in `Lora`, a file of `jaxeco.weights --only lora`, to go with that base.

    Raises:
      ValueError: a field is out of its range.
    """

    path: str
    checkpoint: Which = None
    rename: tuple[tuple[str, str], ...] = ()
    fresh: tuple[str, ...] = ()
    mismatch: Literal["error", "fresh"] = "error"
    lora: str | None = None

    def __post_init__(self) -> None:
        for pair in self.rename:
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[1], str):
                raise ValueError(f"Pretrained.rename: {pair!r}: expected (pattern, replacement)")
            check_pattern("Pretrained.rename", pair[0])
            try:
                re.sub(*pair, "")
            except re.error as error:
                raise ValueError(f"Pretrained.rename: {pair!r}: {error}") from None
        for pattern in self.fresh:
            check_pattern("Pretrained.fresh", pattern)
        if self.mismatch not in ("error", "fresh"):
            raise ValueError(f"Pretrained.mismatch={self.mismatch!r}: expected error or fresh")
        if isinstance(self.checkpoint, str) and self.checkpoint not in ("best", "newest"):
            raise ValueError(
                f"Pretrained.checkpoint={self.checkpoint!r}: expected best, newest, a step or None"
            )

    def load(self, params: Any, tokenizer: str | None = None) -> tuple[Any, Report]:
        """Takes over what the source has.

        Args:
          params: the model's parameters as initialised, a tree of arrays.
          tokenizer: fingerprint of the tokenizer of this run's data.

        Returns:
          the tree with loaded leaves (numpy, on the host) in their places; and what was loaded.

        Raises:
          UserError: the source is missing or damaged; nothing in it, or in a pattern, fits the
            model; a shape differs; its tokens mean other text than this run's.
        """
        weights = read(self.path, self.checkpoint)
        model = trees.named(params)
        source = self._renamed(weights, model)
        kept = self._kept(model)
        shared = [name for name in model if name in source and name not in kept]
        misfits = {
            name: f"{name} is {list(source[name].shape)} there, {list(model[name].shape)} here"
            for name in shared
            if source[name].shape != model[name].shape
        }
        if misfits and self.mismatch == "error":
            raise UserError(
                f"{weights.origin} does not fit the model: {listed(misfits.values(), most=2)};"
                " start_from.mismatch=fresh begins those anew"
            )
        loaded = {
            name: source[name].astype(model[name].dtype, copy=False)
            for name in shared
            if name not in misfits
        }
        if not loaded:
            raise UserError(
                f"{weights.origin} has nothing for this model: it has {listed(source)}, the model"
                f" {listed(model)}; set start_from.rename"
            )
        _check_tokenizer(weights, tokenizer, loaded)
        report = Report(
            weights.origin,
            loaded=tuple(loaded),
            fresh=tuple(name for name in model if name not in loaded),
            unused=tuple(name for name in source if name not in model),
            misfits=tuple(misfits.values()),
        )
        leaves = [loaded[name] if name in loaded else leaf for name, leaf in model.items()]
        return jax.tree.unflatten(jax.tree.structure(params), leaves), report

    def _renamed(self, weights: Weights, model: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The source's arrays by the names that this model would have for them."""
        source = weights.arrays
        for pattern, replacement in self.rename:
            if not any(re.search(pattern, name) for name in source):
                raise UserError(
                    f"start_from.rename: {pattern!r} is in no name of {weights.origin};"
                    f" there are {listed(source)}"
                )
            names = [re.sub(pattern, replacement, name) for name in source]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UserError(f"start_from.rename: {pattern!r} makes two parameters {twice!r}")
            source = dict(zip(names, source.values()))
        if _is_lora(model) and not _is_lora(source):
            source = {f"base/{name}": array for name, array in source.items()}
        if self.lora is not None:
            source = source | read(self.lora).arrays
        if _is_lora(source) and not any(name.startswith("base/") for name in source):
            raise UserError(
                f"{weights.origin} is an adaptation without its base: give the base as"
                f" start_from.path, and this as start_from.lora"
            )
        if _is_lora(source) and not _is_lora(model):
            raise UserError(
                f"{weights.origin} is in parts, of Lora: make one of them with"
                f" python -m jaxeco.weights {self.path} --merge-lora -o merged.safetensors"
            )
        return source

    def _kept(self, model: Mapping[str, Any]) -> set[str]:
        """Names of the model's parameters that stay as they were initialised."""
        kept = set()
        for pattern in self.fresh:
            matches = {name for name in model if re.fullmatch(pattern, name)}
            if not matches:
                raise UserError(
                    f"start_from.fresh: {pattern!r} matches no parameter of the model;"
                    f" there are {listed(model)}"
                )
            kept |= matches
        return kept


def read(path: str | Path, checkpoint: Which = None) -> Weights:
    """The parameters of a run or of a safetensors file; `checkpoint` as in `Pretrained`.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = Path(path).expanduser()
    if (path / CHECKPOINTS).is_dir():
        return _read_run(path, checkpoint)
    if not path.is_file():
        raise UserError(
            f"there is no run in {path}, and no .safetensors file: make one with"
            f" python -m jaxeco.run FILE --workdir {path}"
        )
    if checkpoint is not None:
        raise UserError(f"{path} is a file; only a run's folder has a checkpoint {checkpoint!r}")
    arrays, metadata = trees.read(path)
    if gpt2.is_gpt2(arrays):
        arrays = gpt2.convert(arrays)
    return Weights(
        arrays,
        origin=str(path),
        step=int(metadata["step"]) if "step" in metadata and metadata["step"].isdigit() else None,
        tokenizer=metadata["tokenizer"] if "tokenizer" in metadata else None,
    )


def _read_run(folder: Path, checkpoint: Which) -> Weights:
    found = checkpoints.load(folder / CHECKPOINTS, which=checkpoint, only=("params",))
    return Weights(
        trees.named(found.state["params"]),
        origin=f"{folder} step {found.step:,}",
        step=found.step,
        tokenizer=found.description["tokenizer"] if "tokenizer" in found.description else None,
    )


def _is_lora(names: Mapping[str, Any]) -> bool:
    return any(name.startswith(("base/", "lora/")) for name in names)


def _check_tokenizer(weights: Weights, tokenizer: str | None, loaded: Mapping[str, Any]) -> None:
    """Raises UserError if tokens have been given vectors that stand for other text here."""
    embeds = any(name.endswith("token_embed/embedding") for name in loaded)
    if embeds and None not in (weights.tokenizer, tokenizer) and weights.tokenizer != tokenizer:
        raise UserError(
            f"{weights.origin} was trained with another tokenizer ({weights.tokenizer}) than this"
            f" run's data has ({tokenizer}): use its tokenizer, or start_from.fresh=.*token_embed.*"
        )
