"""Convolutions of few channels, each with 2x2 max pooling behind it, as matrix products for CPU.

The four outputs of which pooling makes one see a square of I + 1 inputs a side. So over images cut
into blocks of 2x2 pixels, a convolution by an I x I kernel is one by a kernel of K = (I + 1) / 2
blocks a side, from 4C channels to 4F, one of F for each place in a block; and pooling takes the
largest of four arrays. That multiplies ((I + 1) / I)² times as often, 1.44 for I = 5. But its
patches hold 2.8 times fewer numbers for I = 5, its products are 4F wide, where F is too narrow for
a processor's vectors, and pooling strides over nothing. Examples lie innermost, so that loops over
a row are long.

B examples, H W height and width, C channels in, F features out, I side of a kernel.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from jaxeco.models.layers import Activation, activate


def fits(height: int, width: int, kernel_sizes: Sequence[int]) -> bool:
    """Whether `convolve_and_pool` takes such images: odd kernels, each of which sees even sides."""
    for size in kernel_sizes:
        if size % 2 == 0 or height % 2 or width % 2 or min(height, width) <= size:
            return False
        height, width = (height - size + 1) // 2, (width - size + 1) // 2
    return True


def convolve_and_pool(
    x_BxHxWxC: jax.Array,
    layers: Sequence[tuple[jax.Array, jax.Array]],
    activation: Activation,
) -> jax.Array:
    """For each layer: convolves without padding, adds the bias, activates, pools 2x2 by the max.

    On a tie, pooling shares the gradient among the largest, as `layers.max_pool` does.

    Args:
      layers: of each the kernel [I, I, C, F] and the bias [F], such that `fits(H, W, (I, ...))`.

    Returns:
      [B, H', W', F of the last layer], of the dtype to which all arguments promote.
    """
    flat = [array for layer in layers for array in layer]
    x_BxHxWxC, *flat = promote_dtype(x_BxHxWxC, *flat, dtype=None)
    kernels, biases = [_over_blocks(kernel) for kernel in flat[::2]], flat[1::2]

    x_CxHxWxB = x_BxHxWxC.transpose(3, 1, 2, 0)
    for kernel, bias_F in zip(kernels, biases, strict=True):
        x_CxHxWxB = _layer(x_CxHxWxB, kernel, bias_F, activation)
    return x_CxHxWxB.transpose(3, 1, 2, 0)


def _over_blocks(kernel_IxIxCxF: jax.Array) -> jax.Array:
    """The kernel over blocks, [K·K·4C, 4F]: where in the patch, in the block; for which place."""
    i, _, c, f = kernel_IxIxCxF.shape
    padded = jnp.pad(kernel_IxIxCxF, ((1, 1), (1, 1), (0, 0), (0, 0)))
    places = [
        padded[1 - row : i + 2 - row, 1 - column : i + 2 - column]
        for row in (0, 1)
        for column in (0, 1)
    ]
    k = (i + 1) // 2
    kernel = jnp.stack(places, axis=3).reshape(k, 2, k, 2, c, 4 * f)
    return kernel.transpose(0, 2, 1, 3, 4, 5).reshape(-1, 4 * f)


def _layer(
    x_CxHxWxB: jax.Array, kernel: jax.Array, bias_F: jax.Array, activation: Activation
) -> jax.Array:
    """One layer by its kernel over blocks: [C, H, W, B] -> [F, H', W', B]."""
    c, h, w, b = x_CxHxWxB.shape
    f = len(bias_F)
    k = round((len(kernel) / (4 * c)) ** 0.5)
    h, w = h // 2, w // 2
    blocks = x_CxHxWxB.reshape(c, h, 2, w, 2, b).transpose(2, 4, 0, 1, 3, 5)
    rows, row = h - k + 1, (w - k + 1) * b
    # W and B as one axis: a shift by a block is one by B numbers. The barriers keep XLA from doing
    # what made x, say its normalisation, anew for each of the patches that hold it.
    blocks = jax.lax.optimization_barrier(blocks.reshape(4 * c, h, w * b))
    shifted = [jax.lax.optimization_barrier(blocks[:, :, j * b : j * b + row]) for j in range(k)]
    patches = jnp.concatenate([shifted[j][:, i : i + rows] for i in range(k) for j in range(k)])
    y = jax.lax.dot_general(kernel, patches.reshape(len(kernel), -1), (((0,), (0,)), ((), ())))
    y_4xFxN = y.reshape(4, f, -1)
    if (
        activation == "gelu"
    ):  # it falls before it rises: the largest need not be that of the largest
        y_FxN = activate(activation, y_4xFxN + bias_F[:, None]).max(0)
    else:
        y_FxN = activate(activation, y_4xFxN.max(0) + bias_F[:, None])
    return y_FxN.reshape(f, rows, w - k + 1, b)
