"""Writes text with the network of experiments/shakespeare_char.py, as jaxeco.sample does."""

from serve import serve

from jaxeco import runtime

runtime.configure()

import jax

from jaxeco.generate import Decoding, Sampling
from jaxeco.models import LanguageModel, Transformer

TOKENS = 250


def main() -> None:
    model = LanguageModel(
        Transformer(vocab_size=65, context=256, layers=4, heads=4, width=128, bias=False)
    )
    text_1x1 = jax.numpy.zeros((1, 1), int)
    params = model.init(jax.random.key(0), text_1x1, train=False)["params"]

    def write() -> int:
        rows = Decoding(model, params, [[0]], tokens=TOKENS, sampling=Sampling(0.8))
        while rows.left:
            rows.extend()
        return TOKENS

    serve(f"jaxeco (JAX {jax.__version__})", write)


main()
