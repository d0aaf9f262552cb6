"""Multi-layer perceptron."""

import flax.linen as nn
import jax

from jaxeco.models.layers import (
    Activation,
    BatchNorm,
    Dropout,
    activate,
    check_choice,
    check_count,
    check_rate,
    logits,
)


class MLP(nn.Module):
    """Linear layers with an activation between; no width at all makes it multinomial regression.

    Each hidden layer is linear -> [batch normalisation] -> activation -> dropout; a linear layer
    that is normalised has no bias of its own. Kernels start from He et al. 2015 (normal, fan-in,
    arXiv:1502.01852) for relu and gelu, from Glorot & Bengio 2010 (uniform) for sigmoid and tanh;
    biases from zero.

    Attributes:
      widths: of the hidden layers, in order.
      num_classes: number of outputs.
      dropout: rate after each hidden layer, in [0, 1).
    """

    widths: tuple[int, ...] = (256, 128)
    num_classes: int = 10
    activation: Activation = "relu"
    dropout: float | jax.Array = 0.0
    batch_norm: bool = False

    def __post_init__(self) -> None:
        for width in self.widths:
            check_count("widths", width)
        check_count("num_classes", self.num_classes)
        check_choice("activation", self.activation, Activation)
        check_rate("dropout", self.dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, ...] of any shape -> logits [B, num_classes], at least float32."""
        init = (
            nn.initializers.he_normal()
            if self.activation in ("relu", "gelu")
            else nn.initializers.glorot_uniform()
        )
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = nn.Dense(width, use_bias=not self.batch_norm, kernel_init=init)(x)
            if self.batch_norm:
                x = BatchNorm()(x, train=train)
            x = activate(self.activation, x)
            x = Dropout(self.dropout)(x, train=train)
        return logits(nn.Dense(self.num_classes, kernel_init=init)(x))
