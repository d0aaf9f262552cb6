"""Small convolutional networks that learn CIFAR-10 in few epochs, after Jordan's airbench (2024).

Shapes: N B images, H height and width, C channels, F features, I J kernel height and width.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxeco.errors import UserError
from jaxeco.models.layers import BatchNorm, Conv, check_count, logits, max_pool
from jaxeco.trees import listed, map_named, named


class CifarNet(nn.Module):
    """Three groups of two 3x3 convolutions behind a strided stem, after Jordan's airbench (2024).

    32x32 -> stem, 4x4 with stride 2 -> 16x16 -> group, pool -> 8x8 -> group, pool -> 4x4 -> group
    -> the largest value of each channel -> linear. The groups are `width`, 2·`width` and 2·`width`
    wide. It differs from airbench in its stem, which quarters the work and is learnt, and in its
    widths. 574,880 parameters at width 64 and 10 classes.

    Attributes:
      width: channels of the first group; the stem has half as many.
      momentum: of batch norm's running averages.
    """

    num_classes: int = 10
    width: int = 64
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_count("num_classes", self.num_classes)
        check_count("width", self.width, least=2)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, H, W, C], H and W multiples of 8 -> logits [B, num_classes], at least float32."""
        x = Conv(self.width // 2, (4, 4), stride=2, padding=1, name="stem")(x)
        x = gelu(x)
        for width, pool in ((self.width, 2), (2 * self.width, 2), (2 * self.width, 1)):
            for window in (pool, 1):
                x = Conv(width, (3, 3), use_bias=False, kernel_init=dirac)(x)
                x = max_pool(x, window)
                x = gelu(BatchNorm(momentum=self.momentum, use_scale=False)(x, train=train))
        # from nearly 0, so that the first steps go to the filters and not to undo the head's
        head_init = nn.initializers.normal(1 / 256)
        head = nn.Dense(self.num_classes, use_bias=False, kernel_init=head_init, name="head")
        return logits(head(x.max((1, 2))))


class Airbench(nn.Module):
    """The network of airbench94 (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU").

    32x32 -> stem, 2x2 -> 31x31 -> group -> 15x15 -> group -> 7x7 -> group -> 3x3 -> the largest
    value of each channel -> linear, over the number of channels. A group is two 3x3 convolutions,
    the first with a 2x2 pool; where that drops the last row and column, the convolution does not
    compute them, which saves a tenth of the work. 1,971,640 parameters as it is.

    The stem has two filters for each number of a patch, which `Whitening` sets.

    Attributes:
      widths: features of each group.
      momentum: of batch norm's running averages.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (64, 256, 256)
    momentum: float = 0.6

    # Whitening tells neighbouring pixels apart, which in 8 bits are often the same.
    kept_float32 = "stem/.*"

    def __post_init__(self) -> None:
        check_count("num_classes", self.num_classes)
        for width in self.widths:
            check_count("widths", width)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, H, W, C], H and W at least 2^(groups + 1) -> logits [B, num_classes], float32."""
        x = gelu(Conv(8 * x.shape[-1], (2, 2), padding="VALID", name="stem")(x))
        for width in self.widths:
            for window in (2, 1):
                _, h, w, _ = x.shape
                pads = (1, 1 - h % window), (1, 1 - w % window)
                conv = Conv(width, (3, 3), padding=pads, use_bias=False, kernel_init=dirac)
                x = max_pool(conv(x), window)
                norm = BatchNorm(momentum=self.momentum, epsilon=1e-12, use_scale=False)
                x = gelu(norm(x, train=train))
        x = x.max((1, 2))
        head = nn.Dense(self.num_classes, use_bias=False, kernel_init=unit_sd, name="head")
        return logits(head(x)) / x.shape[-1]


@jax.checkpoint  # to compute it once more takes less time than to keep its parts
def gelu(x: jax.Array) -> jax.Array:
    # With tanh, which takes less time than erf, and without rounding each part of it to bfloat16.
    y = nn.gelu(x.astype(jnp.promote_types(x.dtype, jnp.float32)), approximate=True)
    return y.astype(x.dtype)


def dirac(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """A kernel [I, J, C, F] whose first C filters pass one channel on each, as airbench has it.

    The other filters are drawn from U(±1/√fan_in).
    """
    i, j, c, f = shape
    bound = (i * j * c) ** -0.5
    kernel_IxJxCxF = jax.random.uniform(key, shape, dtype, -bound, bound)
    n = jnp.arange(min(c, f))
    kernel_IxJxCxF = kernel_IxJxCxF.at[..., : len(n)].set(0)
    return kernel_IxJxCxF.at[i // 2, j // 2, n, n].set(1)


def unit_sd(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Numbers from a uniform distribution around 0, over their standard deviation."""
    kernel = jax.random.uniform(key, shape, dtype, -1, 1)
    return kernel / kernel.std(ddof=1)


@dataclass(frozen=True)
class Whitening:
    """Sets a convolution's kernel to the whitening of patches, for `Experiment.calibrate`.

    Attributes:
      kernel: name of the parameter, [I, J, C, 2·I·J·C].
      examples: images whose patches are taken.
      eps: as in `whitening`.

    Raises:
      ValueError: a number is out of its range.
      UserError, when called: there is no such parameter, or not of this shape.
    """

    kernel: str = "stem/kernel"
    examples: int = 5000
    eps: float = 5e-4

    def __post_init__(self) -> None:
        check_count("Whitening.examples", self.examples)
        if not self.eps > 0:
            raise ValueError(f"Whitening.eps: got {self.eps!r}, expected a number above 0")

    def __call__(self, params: Any, x_NxHxWxC: np.ndarray) -> Any:
        """The parameters with the kernel anew, a numpy array."""
        if self.kernel not in (arrays := named(params)):
            raise UserError(
                f"Whitening.kernel={self.kernel!r}: there is none; there are {listed(arrays)}"
            )
        shape = arrays[self.kernel].shape
        patch = (*shape[:2], x_NxHxWxC.shape[-1])
        if shape != (expected := (*patch, 2 * np.prod(patch))):
            raise UserError(f"{self.kernel} has the shape {shape}, a whitening {expected}")
        kernel_IxJxCxF = whitening(x_NxHxWxC, shape[0], shape[1], self.eps)
        return map_named(lambda name, w: kernel_IxJxCxF if name == self.kernel else w, params)


def whitening(x_NxHxWxC: np.ndarray, height: int, width: int, eps: float) -> np.ndarray:
    """Filters for which what is in a patch is uncorrelated and of one size, and their negatives.

    Eigenvectors of E[patch·patchᵀ], uncentred, over √(eigenvalue + eps) (Jordan 2024, §3.2), of the
    smallest first. On the host and in float64, so that a run begins alike on any device.

    Returns:
      f32[height, width, C, 2·height·width·C].
    """
    _, h, w, c = x_NxHxWxC.shape
    size = height * width * c
    covariance = np.zeros((size, size))
    for x_nxHxWxC in np.array_split(x_NxHxWxC, -(-len(x_NxHxWxC) // 256)):  # or memory would be
        shifted = [
            x_nxHxWxC[:, i : h - height + 1 + i, j : w - width + 1 + j]
            for i in range(height)
            for j in range(width)
        ]
        patches = np.concatenate(shifted, axis=-1, dtype=np.float64).reshape(-1, size)
        covariance += patches.T @ patches
    patches_of_all = len(x_NxHxWxC) * (h - height + 1) * (w - width + 1)
    values_S, vectors_SxS = np.linalg.eigh(covariance / patches_of_all)
    filters_SxS = vectors_SxS / np.sqrt(values_S + eps)
    kernel = np.concatenate([filters_SxS, -filters_SxS], axis=1)
    return kernel.reshape(height, width, c, 2 * size).astype(np.float32)
