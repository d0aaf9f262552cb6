"""The small convolutional network of introductory articles, after LeNet-5 (LeCun et al. 1998)."""

from functools import partial
from itertools import pairwise
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeco import axes
from jaxeco.models import thin
from jaxeco.models.layers import (
    Activation,
    Conv,
    ConvMethod,
    Initializer,
    activate,
    check_choice,
    check_count,
    logits,
    max_pool,
)

Initial = Literal["pytorch", "he", "glorot"]
LeNetConv = Literal[ConvMethod, "blocks"]
CONVOLUTIONS = (6, 16)  # features of each


class LeNet(nn.Module):
    """conv 6 @ 5x5 -> pool 2 -> conv 16 @ 5x5 -> pool 2 -> 120 -> 84 -> classes, without padding.

    62,006 parameters on 32x32x3 images and 10 classes. Images need at least 16 pixels a side.

    Attributes:
      activation: after each layer but the last.
      initial: "pytorch" draws kernels *and* biases from U(±1/√fan_in), PyTorch's default and so
        what those articles train; "he" (normal, fan-in) and "glorot" (uniform) start biases from
        zero.
      conv: how to convolve, see `Conv`; or "blocks": with the pooling, see `thin`. "auto" is
        "blocks" on CPU, where the sides are multiples of 4 and one device has the whole batch or a
        shard of its own; otherwise "matmul". The results are the same up to rounding; a run of
        before "auto" goes on with model.conv=matmul.
    """

    num_classes: int = 10
    activation: Activation = "relu"
    initial: Initial = "pytorch"
    conv: LeNetConv = "auto"

    def __post_init__(self) -> None:
        check_count("num_classes", self.num_classes)
        check_choice("activation", self.activation, Activation)
        check_choice("initial", self.initial, Initial)
        check_choice("conv", self.conv, LeNetConv)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, H, W, C] -> logits [B, num_classes], at least float32. `train` changes nothing."""
        _, height, width, channels = x.shape
        fits = thin.fits(height, width, (5,) * len(CONVOLUTIONS))
        if self.conv == "blocks" and not fits:
            raise ValueError(
                f"LeNet: conv='blocks' does not fit an image of {height}x{width}: expected"
                " sides of 16, 20, 24, ...; or choose conv='auto'"
            )
        alone = jax.default_backend() == "cpu" and axes.mesh_sizes() is None
        if self.conv == "blocks" or (self.conv == "auto" and fits and alone):
            layers = [
                _Parameters(features, self.initial, name=f"Conv_{n}")(inputs)
                for n, (inputs, features) in enumerate(pairwise((channels, *CONVOLUTIONS)))
            ]
            x = thin.convolve_and_pool(x, layers, self.activation)
        else:
            x = self._convolve_and_pool(x, "matmul" if self.conv == "auto" else self.conv)
        x = x.reshape(x.shape[0], -1)
        x = activate(self.activation, self._linear(120, x))
        x = activate(self.activation, self._linear(84, x))
        return logits(self._linear(self.num_classes, x))

    def _convolve_and_pool(self, x: jax.Array, method: ConvMethod) -> jax.Array:
        for n, features in enumerate(CONVOLUTIONS):
            kernel_init, bias_init = initializers(self.initial, fan_in=25 * x.shape[-1])
            x = Conv(
                features,
                (5, 5),
                padding="VALID",
                kernel_init=kernel_init,
                bias_init=bias_init,
                method=method,
                name=f"Conv_{n}",
            )(x)
            x = max_pool(activate(self.activation, x), 2)
        return x

    def _linear(self, features: int, x: jax.Array) -> jax.Array:
        kernel_init, bias_init = initializers(self.initial, fan_in=x.shape[-1])
        return nn.Dense(features, kernel_init=kernel_init, bias_init=bias_init)(x)


class _Parameters(nn.Module):
    """A 5x5 convolution's parameters as `Conv` has them, by themselves."""

    features: int
    initial: Initial

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
        """-> kernel [5, 5, channels, features], bias [features]."""
        kernel_init, bias_init = initializers(self.initial, fan_in=25 * channels)
        kernel = self.param("kernel", kernel_init, (5, 5, channels, self.features), jnp.float32)
        return kernel, self.param("bias", bias_init, (self.features,), jnp.float32)


def initializers(initial: Initial, fan_in: int) -> tuple[Initializer, Initializer]:
    """For the kernel and the bias of a layer each of whose outputs sees `fan_in` inputs."""
    match initial:
        case "pytorch":
            bound = fan_in**-0.5
            uniform = partial(jax.random.uniform, minval=-bound, maxval=bound)
            return uniform, uniform
        case "he":
            return nn.initializers.he_normal(), nn.initializers.zeros
        case "glorot":
            return nn.initializers.glorot_uniform(), nn.initializers.zeros
