"""Flax modules, used through pure `init` and `apply`; they know nothing of training.

A model's fields are its whole configuration, and it is called as
`model.apply(variables, x, train=..., rngs={"dropout": key})`.
"""

from jaxeco.models.cifar import Airbench, CifarNet, Whitening
from jaxeco.models.layers import Activation, BatchNorm, Conv, Dropout, max_pool
from jaxeco.models.lenet import LeNet
from jaxeco.models.lora import Lora
from jaxeco.models.mlp import MLP
from jaxeco.models.resnet import CifarResNet, ResNet
from jaxeco.models.transformer import (
    EncoderDecoder,
    LanguageModel,
    TextClassifier,
    Transformer,
    unscanned,
)

__all__ = [
    "MLP",
    "Activation",
    "Airbench",
    "BatchNorm",
    "CifarNet",
    "CifarResNet",
    "Conv",
    "Dropout",
    "EncoderDecoder",
    "LanguageModel",
    "LeNet",
    "Lora",
    "ResNet",
    "TextClassifier",
    "Transformer",
    "Whitening",
    "max_pool",
    "unscanned",
]
