"""Residual networks (He, Zhang, Ren & Sun 2016, arXiv:1512.03385)."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeco.models.layers import BatchNorm, Conv, ConvMethod, check_choice, check_count, logits

Shortcut = Literal["pad", "project"]
Stem = Literal["cifar", "imagenet"]

# Blocks in each of the four stages, by depth (Table 1). From 50 layers on they are bottlenecks.
STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}

# arXiv:1502.01852; fan-out, which keeps the size of the gradients, as the authors' own code has it.
he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class CifarResNet(nn.Module):
    """The paper's section 4.2, for small images: three stages of width, 2·width and 4·width.

    ResNet-20 has 269,722 parameters for 10 classes by "pad".

    Attributes:
      depth: 6n+2 layers for n blocks a stage: 8, 14, 20, 32, 44, 56, 110, ...
      width: features of the first stage.
      shortcut: where a stage begins, "pad" takes every second pixel and adds channels of zeros
        (option A, as in the paper), "project" a 1x1 convolution (option B).
      zero_init: start the last norm scale of each block at zero, so that every block starts as the
        identity (Goyal et al. 2017, arXiv:1706.02677, section 5.1). Off, as in the first paper.
    """

    depth: int = 20
    num_classes: int = 10
    width: int = 16
    shortcut: Shortcut = "pad"
    zero_init: bool = False
    conv: ConvMethod = "auto"

    def __post_init__(self) -> None:
        check_count("depth", self.depth)
        if self.depth < 8 or self.depth % 6 != 2:
            raise ValueError(
                f"depth: got {self.depth}, expected 6n+2 with n of at least 1 (8, 14, 20, 32, ...)"
            )
        check_count("num_classes", self.num_classes)
        check_count("width", self.width)
        check_choice("shortcut", self.shortcut, Shortcut)
        check_choice("conv", self.conv, ConvMethod)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, H, W, C] -> logits [B, num_classes], at least float32."""
        x = Conv(
            self.width, (3, 3), padding=1, use_bias=False, kernel_init=he_fan_out, method=self.conv
        )(x)
        x = nn.relu(BatchNorm()(x, train=train))
        for stage in range(3):
            for block in range((self.depth - 2) // 6):
                x = Block(
                    self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    shortcut=self.shortcut,
                    zero_init=self.zero_init,
                    conv=self.conv,
                )(x, train=train)
        x = logits(x).mean((1, 2))
        return logits(nn.Dense(self.num_classes, kernel_init=nn.initializers.he_normal())(x))


class ResNet(nn.Module):
    """The paper's Table 1: ResNet-18, 34, 50, 101 and 152.

    Bottlenecks take their stride in the 3x3 convolution, as everyone has since (Goyal et al. 2017).
    The last layer starts from N(0, 0.01²), as there. Parameters: 11,173,962 for ResNet-18 with
    the CIFAR stem and 10 classes, 25,557,032 for ResNet-50 with the ImageNet stem and 1000.

    Attributes:
      stem: "imagenet" is a 7x7 convolution of stride 2 and a 3x3 max-pool of stride 2; "cifar" a
        3x3 convolution, for images of about 32 pixels.
      width: features of the first stage, 64 in the paper.
      shortcut: "project" (option B, as in the paper) or "pad" (option A); see `CifarResNet`.
      zero_init: see `CifarResNet`. Off by default; Goyal et al. turn it on.
    """

    depth: int = 18
    num_classes: int = 1000
    stem: Stem = "imagenet"
    width: int = 64
    shortcut: Shortcut = "project"
    zero_init: bool = False
    conv: ConvMethod = "auto"

    def __post_init__(self) -> None:
        if self.depth not in STAGES:
            raise ValueError(
                f"depth: got {self.depth!r}, expected one of {', '.join(map(str, STAGES))}"
            )
        check_count("num_classes", self.num_classes)
        check_choice("stem", self.stem, Stem)
        check_count("width", self.width)
        check_choice("shortcut", self.shortcut, Shortcut)
        check_choice("conv", self.conv, ConvMethod)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, H, W, C] -> logits [B, num_classes], at least float32."""
        size, stride, padding = (7, 2, 3) if self.stem == "imagenet" else (3, 1, 1)
        x = Conv(
            self.width,
            (size, size),
            stride,
            padding,
            use_bias=False,
            kernel_init=he_fan_out,
            method=self.conv,
        )(x)
        x = nn.relu(BatchNorm()(x, train=train))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate(STAGES[self.depth]):
            for block in range(blocks):
                x = Block(
                    self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    bottleneck=self.depth >= 50,
                    shortcut=self.shortcut,
                    zero_init=self.zero_init,
                    conv=self.conv,
                )(x, train=train)
        x = logits(x).mean((1, 2))
        return logits(nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01))(x))


class Block(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1, beside a shortcut."""

    features: int
    stride: int = 1
    bottleneck: bool = False
    shortcut: Shortcut = "pad"
    zero_init: bool = False
    conv: ConvMethod = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        f, s = self.features, self.stride
        layers = [(3, f, s), (3, f, 1)]  # kernel, features, stride
        if self.bottleneck:
            layers = [(1, f, 1), (3, f, s), (1, 4 * f, 1)]
        *inner, last = layers
        y = x
        for layer in inner:
            y = nn.relu(BatchNorm()(self._convolve(y, *layer), train=train))
        scale_init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        y = BatchNorm(scale_init=scale_init)(self._convolve(y, *last), train=train)
        return nn.relu(y + self._shortcut(x, y.shape[-1], train))

    def _convolve(
        self, x: jax.Array, size: int, features: int, stride: int, name: str | None = None
    ) -> jax.Array:
        return Conv(
            features,
            (size, size),
            stride,
            padding=size // 2,
            use_bias=False,
            kernel_init=he_fan_out,
            method=self.conv,
            name=name,
        )(x)

    def _shortcut(self, x: jax.Array, features: int, train: bool) -> jax.Array:
        if self.stride == 1 and x.shape[-1] == features:
            return x
        if self.shortcut == "project":
            x = self._convolve(x, 1, features, self.stride, name="project")
            return BatchNorm(name="project_norm")(x, train=train)
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))
