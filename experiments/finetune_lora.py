"""finetune_classifier.py with low-rank adaptation (Hu et al. 2021): the trunk's weights stay.

    python -m jaxeco.run experiments/docs_bpe.py                 # first: the weights
    python -m jaxeco.run experiments/finetune_lora.py
    python -m jaxeco.weights runs/finetune_lora --only lora -o lora.safetensors

No result is claimed yet.
"""

import dataclasses

from finetune_classifier import experiment as base

from jaxeco import models, optim, schedules
from jaxeco.experiment import Experiment


def experiment(
    start: str | None = "runs/docs_bpe",  # the run whose weights it starts from
    rank: int = 8,
    lr: float = 5e-3,  # of AdamW; falls linearly to 0
) -> Experiment:
    ex = base(start)
    adamw = optim.AdamW(schedules.Linear(lr, warmup=0.1), weight_decay=0.0)
    return dataclasses.replace(
        ex,
        name="finetune_lora",
        model=models.Lora(
            ex.model, rank, targets=".*/(query|value|up|down)/kernel", learns="head/.*"
        ),
        optimizer=optim.Partition((("lora/.*|base/head/.*", adamw), ("base/.*", None))),
    )
