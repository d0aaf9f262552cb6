"""A multi-layer perceptron on scikit-learn's handwritten digits: real data, no download, seconds.

    python -m jaxeco.run experiments/digits_mlp.py seed=0    # and seed=1, seed=2

Test accuracy 97.31 ± 0.16 % (mean ± sd, n = 3 seeds); 7 s a run, start to end, on a 2-core CPU with
JAX 0.10.2. The test set has 360 digits, so that one of them is 0.28 %.
"""

from jaxeco import data, losses, metrics, models, optim, schedules
from jaxeco.claims import Claim
from jaxeco.experiment import Epochs, Experiment, Steps

CLAIMS = (Claim("test/accuracy", 0.9731, 0.0016, n=3, takes="7 s", device="2-core CPU"),)


def experiment(
    lr: float = 3e-3,  # peak learning rate of AdamW
    weight_decay: float = 1e-2,  # decoupled, on the weight matrices
    widths: tuple[int, ...] = (128, 64),  # hidden layers
    dropout: float = 0.1,  # share of hidden units silenced in training
    batch: int = 64,  # examples a step
    epochs: float = 30,  # passes over the 1,437 training examples
) -> Experiment:
    return Experiment(
        name="digits_mlp",
        train=data.Digits("train"),
        evals={"test": data.Digits("test")},
        preprocess=(data.Normalize(mean=(0.3,), sd=(0.35,), white=16),),
        model=models.MLP(widths=widths, num_classes=10, activation="relu", dropout=dropout),
        loss=losses.SoftmaxCrossEntropy(),
        metrics=(metrics.Accuracy(),),
        eval_metrics=(metrics.ConfusionMatrix(10),),
        optimizer=optim.AdamW(lr=schedules.Cosine(lr, warmup=0.1), weight_decay=weight_decay),
        batch=batch,
        length=Epochs(epochs),
        eval_batch=360,
        eval_every=Epochs(5),
        save_every=Epochs(10),
        log_every=Steps(50),
        best="test/accuracy",
    )
