"""A small convolutional network that learns CIFAR-10 in few epochs."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeco.models.layers import BatchNorm, Conv, check_count, logits, max_pool


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


def gelu(x: jax.Array) -> jax.Array:
    return nn.gelu(x, approximate=True)  # tanh takes less time than erf


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
