"""The two losses. Each scores slot i with the hidden state at i - 1: smol-ar predicts the next token, and smol-mdlm keeps that
shift, as Dream did when it grew from Qwen (arXiv 2508.15487). Knows batches of ids; knows nothing of pools or files.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .network import Network


@dataclass(frozen=True)
class Batch:
    """ids [b, s]; scored [b, s] (bool): slots the loss is about; seen [b, s] (bool): slots that exist, None for all of them."""

    ids: Tensor
    scored: Tensor
    seen: Tensor | None = None


def causal_loss(network: Network, batch: Batch) -> Tensor:
    """Mean next-token cross-entropy over the scored slots, in nats a token."""
    chosen = batch.scored[:, 1:]
    return network.losses(network(batch.ids)[:, :-1][chosen], batch.ids[:, 1:][chosen]).mean()


def masked_loss(network: Network, batch: Batch, t: Tensor, noise: Tensor, mask_id: int) -> Tensor:
    """Upper bound on the negative log-likelihood of the scored slots, nats a token (LLaDA, arXiv 2502.09992, eq. 3).

    t [b]: masking rates; noise [b, s] in [0, 1): scored slots with noise < t are masked, and each counts 1 / t.
    """
    masked = batch.scored & (noise < t[:, None])
    masked[:, 0] = False  # no hidden state scores the first slot
    hidden = network(torch.where(masked, mask_id, batch.ids), batch.seen)
    chosen = masked[:, 1:]
    losses = network.losses(hidden[:, :-1][chosen], batch.ids[:, 1:][chosen])
    weights = (1 / t)[:, None].expand(chosen.shape)[chosen]
    return (losses * weights).sum() / batch.scored[:, 1:].sum()


def stratified(n: int, low: float, generator: torch.Generator) -> Tensor:
    """n masking rates that cover [low, 1] evenly, in random order, float32."""
    rates = (torch.rand(1, generator=generator) + torch.arange(n) / n) % 1
    return rates[torch.randperm(n, generator=generator)].clamp(min=low)
