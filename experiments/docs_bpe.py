"""A small modern decoder on English that ships with Python: its reference and its docstrings.

    python -m jaxeco.run experiments/docs_bpe.py seed=0    # and seed=1, seed=2; no download
    python -m jaxeco.sample runs/docs_bpe --prompt "The method returns"

Loss 3.857 ± 0.011 nats a token on all of the text held out, that is 1.715 ± 0.005 bits a byte (mean
± sd, n = 3 seeds); 3 to 6 minutes a run on a 2-core CPU with JAX 0.10.2, which other work shared.
The text differs a little between versions of Python: this was 3.11's.
"""

from jaxeco import data, losses, metrics, models, optim, schedules
from jaxeco.claims import Claim
from jaxeco.experiment import Epochs, Experiment, Steps

CLAIMS = (
    Claim(
        "test/loss", 3.857, 0.011, n=3, unit="nats a token", takes="3-6 min", device="2-core CPU"
    ),
    Claim("test/bits_per_byte", 1.715, 0.005, n=3, takes="3-6 min", device="2-core CPU"),
)

VOCABULARY = 2048


def corpus(split: str) -> data.Texts:
    return data.Texts((data.PydocTopics(split), data.StdlibDocstrings(split)))


def tokens() -> data.Bpe:
    return data.Bpe(VOCABULARY, corpus("train"))


def trunk(context: int = 128, **fields) -> models.Transformer:
    """The network that finetune_classifier.py starts from."""
    return models.Transformer(
        vocab_size=VOCABULARY,
        context=context,
        layers=4,
        heads=4,
        width=128,
        norm="rms",
        positions="rotary",
        activation="relu2",
        qk_norm=True,
        bias=False,
        separator=data.SEPARATOR,
        pad=data.PAD,
        **fields,
    )


def experiment(
    lr: float = 0.02,  # of Muon, for the matrices of the blocks; falls linearly to 0
    embed_lr: float = 5e-3,  # of AdamW, for all else
    context: int = 128,  # tokens
    batch: int = 16,  # texts a step
    epochs: float = 4,  # passes over the text
    dropout: float = 0.1,
) -> Experiment:
    return Experiment(
        name="docs_bpe",
        train=data.TextWindows(corpus("train"), tokens(), context),
        evals={"test": data.TextWindows(corpus("test"), tokens(), context)},
        model=models.LanguageModel(trunk(context, dropout=dropout)),
        loss=losses.SoftmaxCrossEntropy(),
        metrics=(metrics.Accuracy(),),
        eval_metrics=(metrics.Perplexity(), metrics.BitsPerByte(tokens())),
        optimizer=optim.Muon(
            schedules.Linear(lr),
            rest=optim.AdamW(schedules.Linear(embed_lr), b2=0.95, weight_decay=0.0),
        ),
        batch=batch,
        length=Epochs(epochs),
        eval_batch=64,
        log_every=Steps(20),
        best="test/loss",
    )
