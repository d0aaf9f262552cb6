"""Shakespeare by characters, in the time of nanoGPT's recipe for a CPU: a modern decoder and Muon.

    python -m jaxeco.run experiments/shakespeare_fast.py seed=0    # and seed=1, seed=2
    python -m jaxeco.sample runs/shakespeare_fast --prompt "ROMEO:"

Loss 1.638 ± 0.004 nats a character on all of the last tenth of the text (mean ± sd, n = 3 seeds);
70 to 84 seconds a run, start to end, on a 2-core CPU with JAX 0.10.2. The 2,000 steps of
shakespeare_char.py, which come to 1.803, would take PyTorch 72 seconds at its rate in
docs/benchmarks.md, without evaluation.

To 1.88, nanoGPT's own result for a CPU, as fast as it gets:

    python -m jaxeco.run experiments/shakespeare_fast.py steps=180 every=180 seed=0    # 1, 2

reaches 1.842 ± 0.006 on all of the last tenth (n = 3 seeds) in 33 and 34 s from the start to the
end of the process on a 2-core CPU with JAX 0.10.2; the third, beside other work, took 48 s.
"""

from functools import partial

from shakespeare_char import texts

from jaxeco import data, losses, metrics, models, optim, schedules
from jaxeco.claims import Claim
from jaxeco.experiment import Experiment, Steps

claim = partial(Claim, n=3, unit="nats a character", device="2-core CPU")
CLAIMS = (
    claim("valid/loss", 1.638, 0.004, takes="70-84 s"),
    claim("valid/loss", 1.842, 0.006, words=("steps=180", "every=180"), takes="33 s"),
)


def experiment(
    lr: float = 0.02,  # of Muon, for the matrices of the blocks; falls linearly to 0
    adam_lr: float = 5e-3,  # of AdamW, for embeddings, norms and head
    context: int = 128,  # characters
    batch: int = 16,  # windows of text a step
    steps: int = 450,
    every: int = 150,  # steps between evaluations, and checkpoints
    width: int = 128,
    layers: int = 4,
) -> Experiment:
    train, valid, characters = texts()
    return Experiment(
        name="shakespeare_fast",
        train=data.TextWindows(train, characters, context),
        evals={"valid": data.TextWindows(valid, characters, context)},
        model=models.LanguageModel(
            models.Transformer(
                vocab_size=65,
                context=context,
                layers=layers,
                heads=4,
                width=width,
                norm="rms",
                positions="rotary",
                activation="relu2",
                qk_norm=True,
                bias=False,
                zero_init=True,
            ),
            tied=False,
        ),
        loss=losses.SoftmaxCrossEntropy(),
        metrics=(metrics.Accuracy(),),
        eval_metrics=(metrics.Perplexity(), metrics.BitsPerByte(characters)),
        optimizer=optim.Muon(
            schedules.Linear(lr),
            matrices=".*block_.*/kernel",
            rest=optim.AdamW(schedules.Linear(adam_lr), b1=0.8, b2=0.95, weight_decay=0.0),
        ),
        batch=batch,
        length=Steps(steps),
        steps_per_call=10,
        eval_batch=64,
        eval_every=Steps(every),
        save_every=Steps(every),
        log_every=Steps(20),
        best="valid/loss",
    )
