"""nanoGPT's network and train step, written anew in PyTorch, eager; generation with a KV cache.

The data lies in memory. Attention is torch's own fused one; AdamW is its fused or foreach form,
whichever it takes by itself.
"""

import sys

import torch
from serve import serve
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
LAYERS, HEADS, WIDTH, CONTEXT, BATCH, VOCABULARY = 4, 4, 128, 64, 12, 65


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x, past=None):
        B, T, D = x.shape
        q, k, v = (
            a.view(B, T, HEADS, D // HEADS).transpose(1, 2)
            for a in self.qkv(self.norm1(x)).split(WIDTH, 2)
        )
        if past is not None:
            keys, values, at = past
            keys[:, :, at : at + T], values[:, :, at : at + T] = k, v
            k, v = keys[:, :, : at + T], values[:, :, : at + T]
        o = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        x = x + self.out(o.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(context, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, 0, 0.02)

    def forward(self, tokens, past=None, at=0):
        x = self.tokens(tokens) + self.positions(torch.arange(at, at + tokens.shape[1]))
        for i, block in enumerate(self.blocks):
            x = block(x, None if past is None else (*past[i], at))
        return F.linear(self.norm(x), self.tokens.weight)


def training() -> None:
    model = GPT(CONTEXT)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.99),
    )
    text = torch.randint(0, VOCABULARY, (1_000_000,))

    def train() -> int:
        for _ in range(10):
            first = torch.randint(0, len(text) - CONTEXT - 1, (BATCH,))
            x = torch.stack([text[i : i + CONTEXT] for i in first])
            y = torch.stack([text[i + 1 : i + 1 + CONTEXT] for i in first])
            loss = F.cross_entropy(model(x).view(-1, VOCABULARY), y.view(-1))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return 10 * BATCH * CONTEXT

    serve(f"PyTorch {torch.__version__}, eager", train)


@torch.inference_mode()
def generation(tokens: int = 250) -> None:
    model = GPT(256).eval()

    def generate() -> int:
        shape = (1, HEADS, 256, WIDTH // HEADS)
        past = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(LAYERS)]
        token = torch.zeros(1, 1, dtype=torch.long)
        for at in range(tokens):
            logits = model(token, past, at)[:, -1] / 0.8
            token = torch.multinomial(F.softmax(logits, -1), 1)
        return tokens

    serve(f"PyTorch {torch.__version__}, eager", generate)


{"char_gpt": training, "generate": generation}[sys.argv[1]]()
