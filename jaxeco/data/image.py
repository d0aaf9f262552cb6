"""What happens to images on the device, inside the compiled step.

Shape suffixes: B batch, H height, W width, C channels.

A preprocess is `batch -> batch` and serves training and evaluation; an augmentation is
`(keys_B, batch) -> batch`, for training. Those here touch `batch["x"]` alone. The random numbers of
an example come from its own key (see `axes.example_keys`), so its picture does not depend on its
neighbours or on how many devices share the batch. In training a batch also says which examples of
the data it holds and for which time: "index" and "epoch", i32[B]; and "key" is the same in all
steps of a run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

Batch = dict[str, Any]
Preprocess = Callable[[Batch], Batch]
Augmentation = Callable[[jax.Array, Batch], Batch]


def augmented(transforms: Sequence[Augmentation], keys_B: jax.Array, batch: Batch) -> Batch:
    """Applies augmentations in turn, each with random numbers of its own.

    Handing the same keys to two of them would tie their draws together, for example the side of a
    flip to the place of a crop. Hence each gets the keys folded with its position in the sequence.
    """
    for position, transform in enumerate(transforms):
        batch = transform(jax.vmap(jax.random.fold_in, (0, None))(keys_B, position), batch)
    return batch


def _images(who: object, batch: Batch) -> jax.Array:
    x = batch["x"]
    if x.ndim != 4:
        raise ValueError(f"{who}: got x of shape {x.shape}, expected images [B, H, W, C]")
    return x


@dataclass(frozen=True)
class Normalize:
    """x -> (x / white - mean) / sd in float32, channel by channel.

    Attributes:
      mean, sd: one number for each channel, or a single one for all, of intensities in [0, 1].
      white: the raw value that stands for an intensity of 1; 255 for the usual uint8 images.

    Raises:
      ValueError: if the numbers make no sense, or do not fit the images' channels.
    """

    mean: tuple[float, ...]
    sd: tuple[float, ...]
    white: float = 255.0

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.sd):
            raise ValueError(
                f"Normalize: got {len(self.mean)} means and {len(self.sd)} sds, "
                "expected one of each per channel"
            )
        if not all(math.isfinite(mean) for mean in self.mean):
            raise ValueError(f"Normalize.mean: got {self.mean}, expected finite numbers")
        for name, values in (("sd", self.sd), ("white", (self.white,))):
            if not all(math.isfinite(value) and value > 0 for value in values):
                got = values[0] if len(values) == 1 else values
                raise ValueError(f"Normalize.{name}: got {got}, expected positive numbers")

    def __call__(self, batch: Batch) -> Batch:
        x_BxHxWxC = _images(self, batch)
        if len(self.mean) not in (1, x_BxHxWxC.shape[-1]):
            raise ValueError(
                f"Normalize: got {len(self.mean)} means, "
                f"expected 1 or one for each of the images' {x_BxHxWxC.shape[-1]} channels"
            )
        mean_C, sd_C = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.sd, jnp.float32)
        return batch | {"x": (x_BxHxWxC.astype(jnp.float32) / self.white - mean_C) / sd_C}


@dataclass(frozen=True)
class Flip:
    """Mirrors left and right, with probability 1/2."""

    def __call__(self, keys_B: jax.Array, batch: Batch) -> Batch:
        x_BxHxWxC = _images(self, batch)
        flip_Bx1x1x1 = jax.vmap(jax.random.bernoulli)(keys_B)[:, None, None, None]
        return batch | {"x": jnp.where(flip_Bx1x1x1, x_BxHxWxC[:, :, ::-1], x_BxHxWxC)}


@dataclass(frozen=True)
class AlternatingFlip:
    """Mirrors left and right at random in an image's first epoch, from then on every other time.

    So any two epochs on end show both sides of every image (Jordan 2024, arXiv:2404.00498, §3.6).
    """

    def __call__(self, keys_B: jax.Array, batch: Batch) -> Batch:
        x_BxHxWxC = _images(self, batch)
        own_B = jax.vmap(jax.random.fold_in, (None, 0))(batch["key"], batch["index"])
        flip_B = jax.vmap(jax.random.bernoulli)(own_B) ^ (batch["epoch"] % 2 == 1)
        flip_Bx1x1x1 = flip_B[:, None, None, None]
        return batch | {"x": jnp.where(flip_Bx1x1x1, x_BxHxWxC[:, :, ::-1], x_BxHxWxC)}


@dataclass(frozen=True)
class Crop:
    """Pads every side by `pad` pixels, then cuts the image's own size out at a random place.

    All (2·pad + 1)² places are equally likely (He et al. 2015, "Deep residual learning", §4.2).

    Attributes:
      pad: pixels, at least 1 and less than the image's shorter side.
      mode: what the border holds. "zero" is a 0 on the scale that x has here, i.e. the mean colour
        after `Normalize`; "reflect" mirrors the image without repeating its edge, as `numpy.pad`.
    """

    pad: int
    mode: Literal["zero", "reflect"] = "zero"

    def __post_init__(self) -> None:
        if self.pad < 1:
            raise ValueError(f"Crop.pad: got {self.pad}, expected at least 1 pixel")
        if self.mode not in ("zero", "reflect"):
            raise ValueError(f'Crop.mode: got "{self.mode}", expected "zero" or "reflect"')

    def __call__(self, keys_B: jax.Array, batch: Batch) -> Batch:
        x_BxHxWxC = _images(self, batch)
        _, *size_HxWxC = x_BxHxWxC.shape
        if self.pad >= min(size_HxWxC[:2]):
            raise ValueError(
                f"Crop.pad: got {self.pad}, expected less than the side of the images, "
                f"{size_HxWxC[0]}x{size_HxWxC[1]}"
            )
        mode = "constant" if self.mode == "zero" else "reflect"
        border = (self.pad, self.pad)
        padded = jnp.pad(x_BxHxWxC, ((0, 0), border, border, (0, 0)), mode=mode)
        places = 2 * self.pad + 1
        corner_Bx2 = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, places))(keys_B)
        # The shortest way to write it and, on the CPU, about as fast as gathers along the two axes;
        # selecting among shifted copies and products with one-hots take many times as long.
        cut = jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, (at[0], at[1], 0), size_HxWxC))
        return batch | {"x": cut(padded, corner_Bx2)}


@dataclass(frozen=True)
class Cutout:
    """Sets a square to 0 (DeVries & Taylor 2017, arXiv:1708.04552).

    The centre is uniform over all pixels, so the square may reach beyond the image and lose a part,
    which the paper found to matter. After `Normalize`, 0 is the mean colour.

    Attributes:
      size: side of the square, in pixels. Its first row is `size // 2` above the centre.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Cutout.size: got {self.size}, expected at least 1 pixel")

    def __call__(self, keys_B: jax.Array, batch: Batch) -> Batch:
        x_BxHxWxC = _images(self, batch)
        side_HxW = jnp.asarray(x_BxHxWxC.shape[1:3])
        centre_Bx2 = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, side_HxW))(keys_B)
        first_Bx2 = centre_Bx2 - self.size // 2

        def covered(axis: int) -> jax.Array:
            offset = jnp.arange(x_BxHxWxC.shape[axis + 1]) - first_Bx2[:, axis, None]
            return (offset >= 0) & (offset < self.size)

        hole_BxHxW = covered(0)[:, :, None] & covered(1)[:, None, :]
        return batch | {"x": jnp.where(hole_BxHxW[..., None], 0, x_BxHxWxC)}


@dataclass(frozen=True)
class MirrorShift:
    """Views of an image whose outputs an evaluation averages, as airbench's (Jordan 2024, §3.5).

    Half of the weight is on the image and its mirror image, half on both of them shifted by one
    pixel, down and right or up and left. What comes in at the border mirrors the image, as in
    `Crop`.
    """

    @property
    def weights(self) -> tuple[float, ...]:
        return (1 / 4,) * 2 + (1 / 8,) * 4

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """The views, [B, V, H, W, C]."""
        padded = jnp.pad(x_BxHxWxC, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        shifted = [x_BxHxWxC, padded[:, :-2, :-2], padded[:, 2:, 2:]]
        return jnp.stack([view for x in shifted for view in (x, x[:, :, ::-1])], axis=1)
