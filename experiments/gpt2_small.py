"""The articles' small GPT-2: 2 layers of 512, 4 heads, vocabulary of 10,000, texts of 32 tokens.

    python -m jaxeco.run experiments/gpt2_small.py seed=0    # and seed=1, seed=2
    python -m jaxeco.sample runs/gpt2_small --prompt "To be"

Loss 5.453 nats a token on all of the last tenth of the text, that is 2.437 bits a byte (n = 1, so
no ± sd), on a 2-core CPU with JAX 0.10.2.
"""

from functools import partial

from jaxeco import data, losses, metrics, models, optim
from jaxeco.claims import Claim
from jaxeco.experiment import Epochs, Experiment, Steps

claim = partial(Claim, n=1, takes="4 min", device="2-core CPU")
CLAIMS = (
    claim("valid/loss", 5.453, tolerance=0.05, unit="nats a token"),
    claim("valid/bits_per_byte", 2.437, tolerance=0.02),
)


def experiment(
    lr: float = 1e-3,  # of Adam
    batch: int = 64,  # texts a step
    epochs: float = 2,  # passes over the text
    dropout: float = 0.1,
) -> Experiment:
    train = data.TfdsText("tiny_shakespeare", split="train")
    valid = data.TfdsText("tiny_shakespeare", split="validation+test")
    words = data.Bpe(10_000, train)
    return Experiment(
        name="gpt2_small",
        train=data.TextWindows(train, words, length=32),
        evals={"valid": data.TextWindows(valid, words, length=32)},
        model=models.LanguageModel(
            models.Transformer(
                vocab_size=10_000,
                context=32,
                layers=2,
                heads=4,
                width=512,
                mlp_width=512,
                dropout=dropout,
            )
        ),
        loss=losses.SoftmaxCrossEntropy(),
        metrics=(metrics.Accuracy(),),
        eval_metrics=(metrics.Perplexity(), metrics.BitsPerByte(words)),
        optimizer=optim.Adam(lr),
        batch=batch,
        length=Epochs(epochs),
        eval_batch=64,
        log_every=Steps(10),
        best="valid/loss",
    )
