"""GPT-2's weights as Hugging Face names and lays them out, under the names of `Transformer`.

The model they fit is LanguageModel(Transformer(vocab_size=50257, context=1024, layers=12, heads=12,
width=768)), all else by default: layer norm first, learned positions, "gelu_tanh", biases, tied.
"""

import re
from collections.abc import Mapping

import numpy as np

from jaxeco.errors import UserError

TRUNK = {
    "wte.weight": "token_embed/embedding",
    "wpe.weight": "position_embed/embedding",
    "ln_f.weight": "norm_out/scale",
    "ln_f.bias": "norm_out/bias",
}
BLOCK = {  # a linear layer ("Conv1D") has its kernel as [in, out], as here
    "ln_1.weight": "norm1/scale",
    "ln_1.bias": "norm1/bias",
    "attn.c_proj.weight": "out/kernel",
    "attn.c_proj.bias": "out/bias",
    "ln_2.weight": "norm2/scale",
    "ln_2.bias": "norm2/bias",
    "mlp.c_fc.weight": "up/kernel",
    "mlp.c_fc.bias": "up/bias",
    "mlp.c_proj.weight": "down/kernel",
    "mlp.c_proj.bias": "down/bias",
}
MASKS = ("attn.bias", "attn.masked_bias")  # causal ones, in older files
ATTENTION = {"attn.c_attn.weight": "kernel", "attn.c_attn.bias": "bias"}  # [D, 3·D], [3·D]


def is_gpt2(arrays: Mapping[str, np.ndarray]) -> bool:
    return any(re.fullmatch(r"(transformer\.)?h\.0\.attn\.c_attn\.weight", name) for name in arrays)


def convert(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a file of Hugging Face's GPT-2 by our names.

    Causal masks are left out; a name that is not GPT-2's stays as it is.
    """
    found: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        name = name.removeprefix("transformer.")
        if name in TRUNK:
            found[f"trunk/{TRUNK[name]}"] = array
        elif name == "lm_head.weight":
            found["head/kernel"] = array.T
        elif match := re.fullmatch(r"h\.(\d+)\.(.+)", name):
            block, inner = f"trunk/block_{match[1]}", match[2]
            if inner in BLOCK:
                found[f"{block}/{BLOCK[inner]}"] = array
            elif inner in ATTENTION and array.shape[-1] % 3:
                raise UserError(f"{name} is {list(array.shape)}: expected queries, keys and values")
            elif inner in ATTENTION:
                for part, piece in zip(("query", "key", "value"), np.split(array, 3, axis=-1)):
                    found[f"{block}/{part}/{ATTENTION[inner]}"] = piece
            elif inner not in MASKS:
                found[name] = array
        else:
            found[name] = array
    return found
