"""The same work in PyTorch, eager or compiled, as its tutorials write it; the data lie in memory.

Images are channels-last. Attention is torch's own fused one; the optimizers take their fused or
foreach form, whichever they take by themselves. A third argument `compile` hands the network to
torch.compile.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from serve import START, WORKLOAD, serve
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
COMPILE = sys.argv[3:] == ["compile"]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


def digits() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 64), nn.ReLU(),
        nn.Dropout(0.1), nn.Linear(64, 10),
    )  # fmt: skip


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10),
    )  # fmt: skip


class Airbench(nn.Module):
    """airbench's network for 94 %: a stem that is not learnt but for its bias, three groups."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 24, 2), nn.GELU("tanh")]
        layers[0].weight.requires_grad = False
        channels = 24
        for width in (64, 256, 256):
            for pool in (True, False):
                layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
                layers += [nn.MaxPool2d(2)] * pool
                layers += [nn.BatchNorm2d(width, eps=1e-12, momentum=0.4), nn.GELU("tanh")]
                layers[-2].weight.requires_grad = False
                channels = width
        layers += [nn.MaxPool2d(3), nn.Flatten(), nn.Linear(channels, 10, bias=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x) / 256


class Residual(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if channels != width:
            project = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(width))

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.branch(x))


def resnet18() -> nn.Module:
    """With a stem of 3x3, for small images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    channels = 64
    for width in (64, 128, 256, 512):
        layers.append(Residual(channels, width, 1 if width == channels else 2))
        layers.append(Residual(width, width, 1))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=bias) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x, past=None):
        B, T, D = x.shape
        q, k, v = (
            a.view(B, T, self.heads, D // self.heads).transpose(1, 2)
            for a in self.qkv(self.norm1(x)).split(D, 2)
        )
        if past is not None:
            keys, values, at = past
            keys[:, :, at : at + T], values[:, :, at : at + T] = k, v
            k, v = keys[:, :, : at + T], values[:, :, : at + T]
        o = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        x = x + self.out(o.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2's network; nanoGPT's with `bias=False`."""

    def __init__(
        self, vocabulary: int, context: int, layers: int, heads: int, width: int, bias: bool
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, bias) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=bias)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, 0, 0.02)

    def forward(self, tokens, past=None, at=0):
        x = self.tokens(tokens) + self.positions(torch.arange(at, at + tokens.shape[1]))
        for i, block in enumerate(self.blocks):
            x = block(x, None if past is None else (*past[i], at))
        return F.linear(self.norm(x), self.tokens.weight)


def adamw(params) -> torch.optim.Optimizer:
    params = list(params)
    matrices, rest = ([p for p in params if (p.dim() > 1) == of] for of in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))


small = partial(GPT, 65, layers=4, heads=4, width=128, bias=False)
large = partial(GPT, 50_257, layers=12, heads=12, width=768, bias=True)
sgd = partial(torch.optim.SGD, lr=0.001, momentum=0.9)
nesterov = partial(torch.optim.SGD, lr=0.1, momentum=0.85, nesterov=True)
# model, optimizer (none: forward and backward only), batch, shape of an example, steps in a row
WORKLOADS = {
    "mlp": (mlp, torch.optim.Adam, 128, (1, 28, 28), 10),
    # many seeds are one after another here: the rate of one is that of all
    "mlp_16": (mlp, torch.optim.Adam, 128, (1, 28, 28), 10),
    "digits_1": (digits, adamw, 64, (1, 8, 8), 10),
    "digits_16": (digits, adamw, 64, (1, 8, 8), 10),
    "lenet_4_16": (lenet, sgd, 4, (3, 32, 32), 50),
    "lenet_4": (lenet, sgd, 4, (3, 32, 32), 50),
    "lenet_128": (lenet, sgd, 128, (3, 32, 32), 10),
    "airbench_256": (Airbench, nesterov, 256, (3, 32, 32), 1),
    "airbench_2000": (Airbench, nesterov, 2000, (3, 32, 32), 1),
    "airbench_256_bf16": (Airbench, nesterov, 256, (3, 32, 32), 1),
    "resnet18": (resnet18, sgd, 64, (3, 32, 32), 1),
    "char_gpt": (partial(small, 64), adamw, 12, (64,), 10),
    "char_gpt_bf16": (partial(small, 64), adamw, 12, (64,), 10),
    "gpt2": (partial(large, 1024), None, 1, (256,), 1),
}


def training() -> tuple[nn.Module, Callable[[], float]]:
    make, optimizer_of, batch, shape, steps = WORKLOADS[WORKLOAD]
    steps, step, text = 1 if START else steps, 0, len(shape) == 1
    model = make()
    if text:
        x = torch.randint(0, model.tokens.num_embeddings, (500_000,))
    else:
        model = model.to(memory_format=torch.channels_last)
        x = torch.randint(0, 256, (10_000, *shape), dtype=torch.uint8)
        x = x.contiguous(memory_format=torch.channels_last)
    y, order = torch.randint(0, 10, (10_000,)), torch.randperm(10_000)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(learnt) if optimizer_of else None
    network = torch.compile(model) if COMPILE else model

    def batch_of(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if text:
            windows = torch.stack([x[i : i + shape[0] + 1] for i in chosen])
            return windows[:, :-1], windows[:, 1:].reshape(-1)
        images = x[chosen].to(torch.float32, memory_format=torch.channels_last)
        return (images / 255 - 0.5) / 0.5, y[chosen]

    def train() -> float:
        nonlocal step
        for _ in range(steps):
            chosen = order[torch.arange(step * batch, (step + 1) * batch) % len(order)]
            inputs, targets = batch_of(chosen)
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=WORKLOAD.endswith("_bf16")):
                loss = F.cross_entropy(network(inputs).flatten(0, -2), targets)
            loss.backward()
            if text and optimizer:
                nn.utils.clip_grad_norm_(learnt, 1.0)
            if optimizer:
                optimizer.step()
            step += 1
        return steps * batch * (shape[0] if text else 1)

    return model, train


def generation(tokens: int = 250) -> tuple[nn.Module, Callable[[], float]]:
    model = small(256).eval()
    network = torch.compile(model) if COMPILE else model

    @torch.inference_mode()
    def text() -> float:
        shape = (1, 4, 256, 32)
        past = [(torch.zeros(shape), torch.zeros(shape)) for _ in model.blocks]
        token = torch.zeros(1, 1, dtype=torch.long)
        for at in range(tokens):
            logits = network(token, past, at)[:, -1] / 0.8
            token = torch.multinomial(F.softmax(logits, -1), 1)
        return tokens

    return model, text


class Images(torch.utils.data.Dataset):
    """Each image cropped at random after padding by 4, mirrored at random, and scaled."""

    mean = torch.tensor((0.4914, 0.4822, 0.4465)).view(3, 1, 1)
    sd = torch.tensor((0.2470, 0.2435, 0.2616)).view(3, 1, 1)

    def __init__(self) -> None:
        self.x = torch.randint(0, 256, (10_000, 3, 32, 32), dtype=torch.uint8)
        self.y = torch.randint(0, 10, (10_000,))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        padded = F.pad((self.x[i].float() / 255 - self.mean) / self.sd, (4, 4, 4, 4))
        top, left = torch.randint(0, 9, (2,)).tolist()
        image = padded[:, top : top + 32, left : left + 32]
        return image.flip(2) if torch.rand(()) < 0.5 else image, self.y[i]


def pipeline() -> tuple[nn.Module, Callable[[], float]]:
    loader = torch.utils.data.DataLoader(
        Images(), 256, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )

    def endless() -> Iterator[list[torch.Tensor]]:
        while True:
            yield from loader

    batches = endless()

    def batch() -> float:
        x, _ = next(batches)
        return len(x)

    return nn.Identity(), batch


def main() -> None:
    torch._dynamo.config.recompile_limit = 64
    of = {"generate": generation, "input_resident": pipeline, "input_streamed": pipeline}
    model, work = (of[WORKLOAD] if WORKLOAD in of else training)()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    serve(work, parameters, PyTorch=torch.__version__)


if __name__ == "__main__":
    main()
