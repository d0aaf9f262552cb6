"""The same training in PyTorch, eager, as its tutorials write it; the data lies in memory."""

import sys

import torch
from serve import serve
from torch import nn

torch.manual_seed(0)


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10),
    )  # fmt: skip


def main(workload: str) -> None:
    if workload != "lenet":
        sys.exit("only LeNet is written here")
    model, batch = lenet(), 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    loss_of = nn.CrossEntropyLoss()
    x = torch.randint(0, 256, (10_000, 3, 32, 32), dtype=torch.uint8)
    y = torch.randint(0, 10, (10_000,))
    order = torch.randperm(len(x))
    step = 0

    def train() -> int:
        nonlocal step
        for _ in range(50):
            chosen = order[torch.arange(step * batch, (step + 1) * batch) % len(x)]
            inputs = (x[chosen].float() / 255 - 0.5) / 0.5
            optimizer.zero_grad()
            loss = loss_of(model(inputs), y[chosen])
            loss.backward()
            optimizer.step()
            step += 1
        return 50 * batch

    serve(f"PyTorch {torch.__version__}, eager", train)


main(sys.argv[1])
