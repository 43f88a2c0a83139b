"""Multi-head attention from plain Linear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Scaled dot-product attention; keys have no bias.

    A key bias shifts all scores of a query alike and cancels in the softmax: it gets no gradient and, under DP, nothing
    but noise.

    Args:
        width: token width D.
        heads: number of heads; must divide D.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, query_BND: Tensor, memory_BMD: Tensor) -> Tensor:
        """Attend from (B, N, D) to (B, M, D); returns (B, N, D)."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, x in ((self.query, query_BND), (self.key, memory_BMD), (self.value, memory_BMD))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
