"""The small convolutional network of introductory articles, after LeNet-5 (LeCun et al. 1998)."""

from functools import partial
from typing import Literal

import flax.linen as nn
import jax

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


class LeNet(nn.Module):
    """conv 6 @ 5x5 -> pool 2 -> conv 16 @ 5x5 -> pool 2 -> 120 -> 84 -> classes, without padding.

    62,006 parameters on 32x32x3 images and 10 classes. Images need at least 16 pixels a side.

    Attributes:
      activation: after each layer but the last.
      initial: "pytorch" draws kernels *and* biases from U(±1/√fan_in), PyTorch's default and so
        what those articles train; "he" (normal, fan-in) and "glorot" (uniform) start biases from
        zero.
      conv: how to convolve, see `Conv`. "matmul", since the channels are few and the articles'
        batches of 4 are best run in `lax.scan`.
    """

    num_classes: int = 10
    activation: Activation = "relu"
    initial: Initial = "pytorch"
    conv: ConvMethod = "matmul"

    def __post_init__(self) -> None:
        check_count("num_classes", self.num_classes)
        check_choice("activation", self.activation, Activation)
        check_choice("initial", self.initial, Initial)
        check_choice("conv", self.conv, ConvMethod)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, H, W, C] -> logits [B, num_classes], at least float32. `train` changes nothing."""
        for features in (6, 16):
            kernel_init, bias_init = initializers(self.initial, fan_in=25 * x.shape[-1])
            x = Conv(
                features,
                (5, 5),
                padding="VALID",
                kernel_init=kernel_init,
                bias_init=bias_init,
                method=self.conv,
            )(x)
            x = max_pool(activate(self.activation, x), 2)
        x = x.reshape(x.shape[0], -1)
        x = activate(self.activation, self._linear(120, x))
        x = activate(self.activation, self._linear(84, x))
        return logits(self._linear(self.num_classes, x))

    def _linear(self, features: int, x: jax.Array) -> jax.Array:
        kernel_init, bias_init = initializers(self.initial, fan_in=x.shape[-1])
        return nn.Dense(features, kernel_init=kernel_init, bias_init=bias_init)(x)


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
