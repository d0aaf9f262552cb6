"""Layers that keep their meaning wherever the batch lies: on one device, or split over many.

Shapes: B batch, H W height and width, C channels in, F features out, I J kernel height and width.
Parameters are named and shaped as in `flax.linen`, so a checkpoint of one fits the other. Layers
compute in the dtype to which input and parameters promote, and a convolution in bfloat16 if its
kernel is; reductions run in at least float32.
"""

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial, reduce
from numbers import Integral
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeco import axes, onednn, threefry

Initializer = Callable[..., jax.Array]
Activation = Literal["relu", "sigmoid", "tanh", "gelu"]
ConvMethod = Literal["auto", "xla", "matmul"]
Sides = tuple[int, int]
Padding = Literal["SAME", "VALID"] | int | tuple[Sides, Sides]


# Checks, for `__post_init__`: a bad value fails where it is written, not when the model compiles.


def check_choice(field: str, value: object, literal: Any) -> None:
    """Raises ValueError unless `value` is one of the `Literal` type's; names the nearest."""
    options = get_args(literal)
    if value not in options:
        near = get_close_matches(str(value), map(str, options), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{field}: got {value!r}, expected one of {', '.join(map(str, options))}{hint}"
        )


def check_count(field: str, value: object, least: int = 1) -> None:
    """Raises ValueError unless `value` is a whole number of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{field}: got {value!r}, expected a whole number of at least {least}")


def check_rate(field: str, value: Any) -> None:
    """Raises ValueError unless 0 <= value < 1. A JAX array may be traced and is taken on trust."""
    if not isinstance(value, jax.Array) and not 0 <= value < 1:
        raise ValueError(f"{field}: got {value!r}, expected a number in [0, 1)")


# Functions.


def activate(name: Activation, x: jax.Array) -> jax.Array:
    """Applies an activation by name; "gelu" is the exact x Φ(x) of arXiv:1606.08415, not tanh's."""
    check_choice("activation", name, Activation)
    functions: dict[Activation, Callable[[jax.Array], jax.Array]] = {
        "relu": jax.nn.relu,
        "sigmoid": jax.nn.sigmoid,
        "tanh": jnp.tanh,
        "gelu": partial(jax.nn.gelu, approximate=False),
    }
    return functions[name](x)


def max_pool(x_BxHxWxC: jax.Array, window: int) -> jax.Array:
    """Largest value in each of the `window` x `window` squares that tile an image.

    Where the window divides both sides this is the largest of window² slices, which on CPU is much
    faster than XLA's reduce-window, backward above all. On a tie it shares the gradient among the
    equal values, where reduce-window gives all of it to the first; after a relu it is squares of
    zeros that tie, and those pass no gradient on. Where the window does not divide a side, the rest
    at the right and the bottom is dropped, by reduce-window.

    Returns:
      [B, H // window, W // window, C], dtype of x.

    Raises:
      ValueError: if the window is less than 1 or larger than the image.
    """
    _, h, w, _ = x_BxHxWxC.shape
    check_count("window", window)
    if window > min(h, w):
        raise ValueError(f"max_pool: a window of {window} does not fit an image of {h}x{w}")
    if h % window or w % window:
        return nn.max_pool(x_BxHxWxC, (window, window), (window, window))
    return _tiled_max(x_BxHxWxC, window)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _tiled_max(x_BxHxWxC: jax.Array, window: int) -> jax.Array:
    return reduce(jnp.maximum, _places(_tiles(x_BxHxWxC, window)))


def _tiles(x_BxHxWxC: jax.Array, window: int) -> jax.Array:
    b, h, w, c = x_BxHxWxC.shape
    return x_BxHxWxC.reshape(b, h // window, window, w // window, window, c)


def _places(tiles: jax.Array) -> list[jax.Array]:
    """The images made of the first values of all squares, of the second ones, and so on."""
    _, _, rows, _, columns, _ = tiles.shape
    return [tiles[:, :, r, :, c] for r in range(rows) for c in range(columns)]


def _tiled_max_forward(x: jax.Array, window: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = _tiled_max(x, window)
    return y, (x, y)


def _tiled_max_backward(
    window: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array]:
    x, y = saved
    tiles = _tiles(x, window)
    ties = sum(jnp.where(place == y, 1.0, 0.0) for place in _places(tiles))
    # The barrier keeps XLA from working this out anew for each value of a square.
    share = jax.lax.optimization_barrier((dy / ties).astype(dy.dtype))
    largest = tiles == y[:, :, None, :, None]
    return (jnp.where(largest, share[:, :, None, :, None], 0).reshape(x.shape),)


_tiled_max.defvjp(_tiled_max_forward, _tiled_max_backward)


def logits(x: jax.Array) -> jax.Array:
    """Outputs in at least float32, since a softmax over bfloat16 loses the loss's digits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# Layers.


class Conv(nn.Module):
    """2-D convolution of an NHWC image with an HWIO kernel, as `nn.Conv`.

    `method` chooses how it is computed; the result is the same up to rounding:

    - "xla": XLA's own convolution.
    - "matmul": the patches side by side (im2col), then one matrix product. The patches take I·J
      times the memory of the input. On CPU it is faster for the few channels of an image, and many
      times so inside `lax.scan`, where XLA's convolution leaves its fast path. It also remains a
      matrix product under `vmap` over kernels, where "xla" becomes a slow grouped convolution.
    - "auto": on CPU "matmul" where a patch holds at most 32 numbers (a 3x3 kernel on an RGB image);
      otherwise oneDNN's where that is installed (`jaxeco/onednn.py`), else "xla".

    Attributes:
      features: F.
      kernel_size: (I, J).
      stride: the same for height and width.
      padding: "SAME", "VALID", or pixels of zeros: on each of the four sides, or
        ((top, bottom), (left, right)).
    """

    features: int
    kernel_size: tuple[int, int]
    stride: int = 1
    padding: Padding = "SAME"
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    method: ConvMethod = "auto"

    def __post_init__(self) -> None:
        check_count("features", self.features)
        check_count("stride", self.stride)
        for size in self.kernel_size:
            check_count("kernel_size", size)
        if isinstance(self.padding, str):
            check_choice("padding", self.padding, Literal["SAME", "VALID"])
        else:
            for count in jax.tree.leaves(self.padding):
                check_count("padding", count, least=0)
        check_choice("method", self.method, ConvMethod)
        super().__post_init__()

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        *_, h, w, c = x_BxHxWxC.shape
        shape_IxJxCxF = (*self.kernel_size, c, self.features)
        kernel_IxJxCxF = self.param("kernel", self.kernel_init, shape_IxJxCxF, jnp.float32)
        bias_F = None
        if self.use_bias:
            bias_F = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        narrow = kernel_IxJxCxF.dtype == jnp.bfloat16
        x_BxHxWxC, kernel_IxJxCxF, bias_F = nn.dtypes.promote_dtype(
            x_BxHxWxC, kernel_IxJxCxF, bias_F, dtype=jnp.bfloat16 if narrow else None
        )
        pads = _pads((h, w), self.kernel_size, self.stride, self.padding)
        thin = jax.default_backend() == "cpu" and math.prod(self.kernel_size) * c <= 32
        if self.method == "matmul" or (self.method == "auto" and thin):
            y_BxHxWxF = _convolve_by_matmul(x_BxHxWxC, kernel_IxJxCxF, self.stride, pads)
        elif self.method == "auto" and onednn.convolves(
            x_BxHxWxC, kernel_IxJxCxF, self.stride, pads
        ):
            y_BxHxWxF = onednn.convolve(x_BxHxWxC, kernel_IxJxCxF, self.stride, pads)
        else:
            y_BxHxWxF = jax.lax.conv_general_dilated(
                x_BxHxWxC,
                kernel_IxJxCxF,
                (self.stride, self.stride),
                pads,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return y_BxHxWxF if bias_F is None else y_BxHxWxF + bias_F


def _pads(
    sides: tuple[int, int], kernel_size: tuple[int, int], stride: int, padding: Padding
) -> tuple[Sides, Sides]:
    """Zeros before and after each side; raises ValueError where the kernel then does not fit."""
    if isinstance(padding, str):
        top_bottom, left_right = jax.lax.padtype_to_pads(
            sides, kernel_size, (stride, stride), padding
        )
        pads = top_bottom, left_right
    elif isinstance(padding, tuple):
        pads = padding
    else:
        pads = (padding, padding), (padding, padding)
    if any(
        side + sum(pad) < size for side, size, pad in zip(sides, kernel_size, pads, strict=True)
    ):
        raise ValueError(
            f"Conv: a kernel of {kernel_size[0]}x{kernel_size[1]} does not fit an image of "
            f"{sides[0]}x{sides[1]} with padding {padding!r}"
        )
    return pads


def _convolve_by_matmul(
    x_BxHxWxC: jax.Array, kernel_IxJxCxF: jax.Array, stride: int, pads: Sequence[tuple[int, int]]
) -> jax.Array:
    i, j, _, f = kernel_IxJxCxF.shape
    x_BxHxWxC = jnp.pad(x_BxHxWxC, ((0, 0), *pads, (0, 0)))
    # The first row and column at which a patch would stick out.
    h, w = x_BxHxWxC.shape[1] - i + 1, x_BxHxWxC.shape[2] - j + 1
    # First along rows, then along columns: I + J slices, where one after another would be I·J.
    x_BxHxWxJC = jnp.concatenate([x_BxHxWxC[:, :, c : c + w : stride] for c in range(j)], axis=-1)
    x_BxHxWxIJC = jnp.concatenate([x_BxHxWxJC[:, r : r + h : stride] for r in range(i)], axis=-1)
    return x_BxHxWxIJC @ kernel_IxJxCxF.reshape(-1, f)


class BatchNorm(nn.Module):
    """Batch normalisation (arXiv:1502.03167) over the *global* batch, however it is split.

    Inside shard_map and pmap the statistics are averaged over all shards; under jit the batch is
    whole already. They are computed in at least float32 whatever the dtype of x, which is also the
    dtype of the result.

    Attributes:
      momentum: what the running averages (collection "batch_stats") keep of themselves at each
        step; PyTorch calls one minus this its momentum. The running variance is the biased one.
      epsilon: added to the variance.
      use_scale: learn a factor beside the offset.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    use_scale: bool = True
    scale_init: Initializer = nn.initializers.ones

    def __post_init__(self) -> None:
        check_rate("momentum", self.momentum)
        if not isinstance(self.epsilon, jax.Array) and not self.epsilon > 0:
            raise ValueError(f"epsilon: got {self.epsilon!r}, expected a number above 0")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalises the last axis of x by the batch if `train`, else by the running averages."""
        if train and not axes.mapped_axes() and onednn.normalises(x, self.epsilon):
            return self._by_onednn(x)
        norm = nn.BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=x.dtype,
            use_scale=self.use_scale,
            scale_init=self.scale_init,
            axis_name=axes.mapped_axes() or None,  # type: ignore[arg-type]  # typed too narrowly
        )
        nn.share_scope(self, norm)
        return norm(x)

    def _by_onednn(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale_C = self.param("scale", self.scale_init, shape) if self.use_scale else jnp.ones(shape)
        bias_C = self.param("bias", nn.initializers.zeros, shape)
        y, *found = onednn.batch_norm(
            x, scale_C.astype(jnp.float32), bias_C.astype(jnp.float32), self.epsilon
        )
        for name, start, batch_C in zip(("mean", "var"), (jnp.zeros, jnp.ones), found, strict=True):
            running = self.variable("batch_stats", name, start, shape)
            if not self.is_initializing():
                running.value = self.momentum * running.value + (1 - self.momentum) * batch_C
        return y


class Dropout(nn.Module):
    """Inverted dropout (jmlr 15:1929): zeros with probability `rate`, the rest over 1 - rate.

    An example's mask depends on the "dropout" key, on where this layer sits in the model and on the
    example's position in the *global* batch, and so not on how many devices share the batch.

    Attributes:
      rate: in [0, 1). It may be a traced number, say of a sweep by `vmap`; a plain 0 draws nothing
        and needs no key.
    """

    rate: float | jax.Array

    def __post_init__(self) -> None:
        check_rate("rate", self.rate)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Drops entries of x, [B, ...], if `train`; otherwise returns x itself."""
        if not train or (not isinstance(self.rate, jax.Array) and self.rate == 0):
            return x
        keep = 1 - self.rate
        keys_B = axes.example_keys(self.make_rng("dropout"), x.shape[0])
        # In float32 whatever x is, so that the mask does not depend on the precision of a run.
        draw = jax.vmap(lambda key: threefry.uniform(key, x.shape[1:]))
        return jnp.where(draw(keys_B) < keep, x / jnp.asarray(keep, x.dtype), 0)
