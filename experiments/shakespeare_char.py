"""Shakespeare by characters: nanoGPT's recipe and network (Karpathy 2022), trained with AdamW.

    python -m jaxeco.run experiments/shakespeare_char.py seed=0    # and seed=1, seed=2
    python -m jaxeco.sample runs/shakespeare_char --prompt "ROMEO:"
    python -m jaxeco.run experiments/shakespeare_char.py setting=gpu

Loss 1.803 ± 0.011 nats a character on all of the last tenth of the text (mean ± sd, n = 3 seeds);
1.5 minutes a run, start to end, on a 2-core CPU with JAX 0.10.2. It is nanoGPT's setting for a CPU
with twice its learning rate. The setting for a GPU is untried.
"""

from typing import Literal, NamedTuple

from jaxeco import data, losses, metrics, models, optim, schedules
from jaxeco.claims import Claim
from jaxeco.experiment import Experiment, Steps

CLAIMS = (
    Claim(
        "valid/loss",
        1.803,
        0.011,
        n=3,
        unit="nats a character",
        takes="1.5 min",
        device="2-core CPU",
    ),
)


class Setting(NamedTuple):
    layers: int
    heads: int
    width: int
    context: int  # characters
    batch: int  # windows of text a step
    steps: int
    dropout: float


SETTINGS = {
    "cpu": Setting(layers=4, heads=4, width=128, context=64, batch=12, steps=2000, dropout=0.0),
    "gpu": Setting(layers=6, heads=6, width=384, context=256, batch=64, steps=5000, dropout=0.2),
}


def texts() -> tuple[data.TfdsText, data.TfdsText, data.Characters]:
    """The first nine tenths of the text, the last tenth, and the characters as tokens."""
    train = data.TfdsText("tiny_shakespeare", split="train")
    valid = data.TfdsText("tiny_shakespeare", split="validation+test")
    return train, valid, data.Characters(train)


def experiment(
    setting: Literal["cpu", "gpu"] = "cpu",  # nanoGPT's network for a CPU, or that for a GPU
    lr: float = 2e-3,  # of AdamW; falls along a cosine to a tenth (nanoGPT: 1e-3)
) -> Experiment:
    of = SETTINGS[setting]
    train, valid, characters = texts()
    return Experiment(
        name="shakespeare_char",
        train=data.TextWindows(train, characters, of.context),
        evals={"valid": data.TextWindows(valid, characters, of.context)},
        model=models.LanguageModel(
            models.Transformer(
                vocab_size=65,
                context=of.context,
                layers=of.layers,
                heads=of.heads,
                width=of.width,
                dropout=of.dropout,
                bias=False,
            )
        ),
        loss=losses.SoftmaxCrossEntropy(),
        metrics=(metrics.Accuracy(),),
        eval_metrics=(metrics.Perplexity(), metrics.BitsPerByte(characters)),
        optimizer=optim.AdamW(
            schedules.Cosine(lr, warmup=100, final=lr / 10), b2=0.99, weight_decay=0.1
        ),
        clip_norm=1.0,
        batch=of.batch,
        length=Steps(of.steps),
        steps_per_call=10,
        eval_batch=128,
        eval_every=Steps(of.steps // 4),
        save_every=Steps(of.steps // 4),
        best="valid/loss",
    )
