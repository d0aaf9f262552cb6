"""A tiny GPT-2 with random weights as Hugging Face saves it, and its logits: a golden file for us.

    python -m venv .venv-torch && .venv-torch/bin/pip install torch transformers safetensors
    .venv-torch/bin/python scripts/gpt2_golden.py tests/golden/gpt2_tiny.safetensors

PyTorch and transformers are never dependencies of ours, so they want an environment of their own.
Beside the weights the file holds `golden.tokens` i32[2, 17] and `golden.logits` f32[2, 17, V].
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    config = GPT2Config(
        vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # biases and norms start at 0 and 1, where some mistakes do not show
            weight.normal_(std=0.3)
            if ".ln_" in name and name.endswith("weight"):
                weight.add_(1)
        tokens = torch.randint(config.vocab_size, (2, 17))
        logits = model(tokens).logits
    arrays = dict(model.state_dict())
    del arrays["lm_head.weight"]  # tied, and so not in the files that are published
    arrays |= {"golden.tokens": tokens.int(), "golden.logits": logits}
    save_file({name: array.contiguous() for name, array in arrays.items()}, options.output)
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
