"""The decoder: frozen features to task tokens (SSPFormer, section 3.1, "Transformer decoder")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sspformer.model.attention import Attention
from sspformer.model.embed import resize_positions


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to the projected features with the task token in the query, feed-forward."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_norm, self.cross_norm, self.ffn_norm = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x_BNd: Tensor, memory_BNd: Tensor, task_d: Tensor) -> Tensor:
        """One block; shapes in and out are (B, N, d)."""
        normal = self.self_norm(x_BNd)
        x_BNd = x_BNd + self.self_attention(normal, normal)
        x_BNd = x_BNd + self.cross_attention(self.cross_norm(x_BNd) + task_d, memory_BNd)
        return x_BNd + self.feed_forward(self.ffn_norm(x_BNd))


class Decoder(nn.Module):
    """LayerNorm, Linear D -> d, positions, then `depth` blocks and a LayerNorm.

    The task token enters the query only: added to the keys it would shift all scores of a query alike.

    Args:
        features: width D of the encoder's features.
        width: width d of the decoder.
        depth: number of blocks l (4 in the paper).
        heads: attention heads.
        hidden: hidden width of the feed-forward.
        grid: patches per side for which positions are learnt.
    """

    def __init__(self, features: int, width: int, depth: int, heads: int, hidden: int, grid: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(features)
        self.project = nn.Linear(features, width)
        self.position = nn.Parameter(torch.randn(1, width, grid, grid) * 0.02)
        self.task = nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, hidden) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, features_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Task tokens as a map of shape (B, d, g, g), contiguous.

        Contiguous on purpose: per-sample gradients of convolutions over channels-last activations are silently wrong
        in a widely used DP library, and nothing here should depend on that.
        """
        memory_BNd = self.project(self.norm_in(features_BND))
        x_BNd = memory_BNd + resize_positions(self.position, grid).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x_BNd = block(x_BNd, memory_BNd, self.task)
        return self.norm_out(x_BNd).transpose(1, 2).unflatten(2, grid).contiguous()
