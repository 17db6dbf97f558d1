"""A decoder-only transformer over bytes.

Pre-norm blocks with RMSNorm, rotary positions, causal scaled-dot-product attention and a GELU MLP of four
times the width. No biases, no dropout. The output matrix is not tied to the embedding.

B sequences, T positions, D model width, H heads, K = D / H head width, V = 256 byte values.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commq.train.config import ModelConfig

VOCABULARY = 256


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BTD: Tensor, rotation_TK: tuple[Tensor, Tensor]) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_BTD).chunk(3, dim=-1)
        )
        q_BHTK, k_BHTK = rotate(q_BHTK, *rotation_TK), rotate(k_BHTK, *rotation_TK)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, 4 * config.dim, bias=False),
            nn.GELU(),
            nn.Linear(4 * config.dim, config.dim, bias=False),
        )

    def forward(self, x_BTD: Tensor, rotation_TK: tuple[Tensor, Tensor]) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation_TK)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class GPT(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        self.head_width = config.dim // config.heads
        self._initialize()

    def _initialize(self) -> None:
        """Normal(0, 0.02); what writes to the residual stream is smaller by sqrt(number of writers)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * len(self.blocks)) ** 0.5 if writes else 0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """tokens_BT: int64, T at most the context. Returns logits_BTV."""
        rotation_TK = rotation_table(tokens_BT.shape[1], self.head_width, tokens_BT.device)
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotation_TK)
        return self.head(self.norm(x_BTD))


def next_byte_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte, float32."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())


@functools.cache
def rotation_table(length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * 10000 ** (-2 i / K), i < K / 2, once for each half: float32 (T, K)."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.outer(torch.arange(length, device=device), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + K / 2]) by the angles of their position (RoPE, arXiv 2104.09864)."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return (x_BHTK * cos_TK + torch.cat((-second, first), dim=-1) * sin_TK).type_as(x_BHTK)
