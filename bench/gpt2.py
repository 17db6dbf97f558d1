"""GPT-2 in plain torch, for benchmarks: the shapes of the published models, random weights and tokens.

Learned positions, biases, GELU, the output matrix tied to the embedding. No dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    layers: int
    dim: int
    heads: int
    vocabulary: int = 50257
    context: int = 512


MODELS = {
    "gpt2": GPT2Config(layers=12, dim=768, heads=12),
    "gpt2-medium": GPT2Config(layers=24, dim=1024, heads=16),
    "gpt2-1.3b": GPT2Config(layers=24, dim=2048, heads=16),
    "tiny": GPT2Config(layers=2, dim=64, heads=2, vocabulary=1009, context=64),
}
"""124, 355 and 1313 million parameters; tiny, 0.17 million, is for trying things out."""


class Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x_BTD)).chunk(3, -1)
        )
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        x_BTD = x_BTD + self.out(y_BHTK.transpose(1, 2).flatten(2))
        return x_BTD + self.mlp(self.norm_2(x_BTD))


class GPT2(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.dim)
        self.positions = nn.Embedding(config.context, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """tokens_BT: int64, one more than the context. Returns the mean loss of the next token."""
        inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
        x_BTD = self.tokens(inputs_BT) + self.positions.weight[: inputs_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = F.linear(self.norm(x_BTD), self.tokens.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def random_tokens(config: GPT2Config, rows: int, *, seed: int, device: torch.device) -> Tensor:
    """int64 (rows, context + 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocabulary, (rows, config.context + 1), generator=generator).to(device)
