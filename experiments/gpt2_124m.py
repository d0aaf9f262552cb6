"""GPT-2's 124,439,808 parameters on the English Wikipedia; for an accelerator.

    python -m jaxeco.run experiments/gpt2_124m.py
    python -m jaxeco.run experiments/gpt2_124m.py data_set=lm1b vocabulary=gpt2_tokenizer.json

No result is claimed: it is not trained to its end, since no accelerator was at hand. What the tests
show is that it is GPT-2: the parameters' number and, for the same weights, the logits of
Hugging Face's implementation.
"""

from typing import Literal

from jaxeco import data, losses, metrics, models, optim, schedules
from jaxeco.experiment import Experiment, Steps

CLAIMS = ()  # none


def experiment(
    data_set: Literal["wiki40b/en", "lm1b", "tiny_shakespeare"] = "wiki40b/en",  # of tfds
    vocabulary: str | None = None,  # a tokenizer's file; none: a BPE trained on the first documents
    lr: float = 6e-4,  # of AdamW; falls along a cosine to a tenth
    context: int = 1024,
    batch: int = 480,  # texts a step: 0.5 million tokens
    micro_batches: int = 30,
    steps: int = 18_865,  # 9.3 billion tokens, of which GPT-2 saw about ten times as many
    precision: Literal["float32", "bfloat16"] = "bfloat16",
) -> Experiment:
    first, valid = {
        "wiki40b/en": ("train[:1%]", "validation"),
        "lm1b": ("train[:1%]", "test"),
        "tiny_shakespeare": ("train", "validation+test"),
    }[data_set]
    tokens = (
        data.TokenizerFile(vocabulary)
        if vocabulary
        else data.Bpe(50_257, data.TfdsText(data_set, first))
    )
    return Experiment(
        name="gpt2_124m",
        train=data.TextWindows(data.TfdsText(data_set, "train"), tokens, context),
        evals={"valid": data.TextWindows(data.TfdsText(data_set, valid), tokens, context)},
        model=models.LanguageModel(
            models.Transformer(
                vocab_size=50_257,
                context=context,
                layers=12,
                heads=12,
                width=768,
            )
        ),
        loss=losses.SoftmaxCrossEntropy(),
        eval_metrics=(metrics.Perplexity(), metrics.BitsPerByte(tokens)),
        optimizer=optim.AdamW(
            schedules.Cosine(lr, warmup=700, final=lr / 10),
            b2=0.95,
            weight_decay=0.1,
        ),
        clip_norm=1.0,
        batch=batch,
        grad_accum=micro_batches,
        precision=precision,
        length=Steps(steps),
        eval_batch=16,
        eval_every=Steps(1000),
        save_every=Steps(1000),
        log_every=Steps(10),
        best="valid/loss",
    )
