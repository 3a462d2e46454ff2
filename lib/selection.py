"""Which direction, which operation: every candidate is scored with one forward pass a class, and the whole table is kept.

The three scores of arXiv 2406.11717, read where a masked diffusion model shows them, at the first masked response slots:

    bypass      refusal log-odds on harmful prompts under the operation      (lower is better)
    induce      the same on harmless prompts with the difference added       (higher is better)
    divergence  KL to the unsteered model on harmless prompts                (a bound: broken text does not refuse either)

and a fourth, `auroc` of the projection on held-out prompts: effect without discrimination is damage (an attention sink that is
ablated takes refusals to zero and the model with it).
"""

from collections.abc import Sequence
from functools import lru_cache

import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from .evaluation import divergence, first_slots, refusal_log_odds
from .extraction import Candidates, Direction, activations
from .models import LanguageModel
from .steering import Intervention, ablate, add, clamp

OPERATIONS = {
    "ablate everywhere": lambda d, n_layers: ablate(d),
    "ablate at layer": lambda d, n_layers: ablate(d, ("resid_pre",), d.layer),
    "clamp from layer": lambda d, n_layers: clamp(d, layers=range(d.layer, n_layers)),
}


class NothingSelected(ValueError):
    """No candidate passes the thresholds; the message says what failed and how close the best came."""


def operate(lm: LanguageModel, direction: Direction, operation: str) -> Intervention:
    """The named operation of OPERATIONS with a direction."""
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation!r}; use one of {', '.join(OPERATIONS)}")
    return OPERATIONS[operation](direction, lm.n_layers)


def discrimination(lm: LanguageModel, candidates: Candidates, harmful: Sequence[str], harmless: Sequence[str]) -> pd.DataFrame:
    """AUROC of the projection on each candidate, for prompts that did not make it: rows layer, position, auroc."""
    x = torch.cat([activations(lm, harmful), activations(lm, harmless)])  # [n, p, l, d]
    labels = [1] * len(harmful) + [0] * len(harmless)
    projections = torch.einsum("npld,pld->npl", x, candidates.difference.float())
    return pd.DataFrame(
        dict(layer=layer, position=position, auroc=roc_auc_score(labels, projections[:, p, layer]))
        for p, position in enumerate(candidates.positions)
        for layer in range(projections.shape[2])
    )


def score(
    layer: int,
    position: int,
    operation: str,
    lm: LanguageModel,
    candidates: Candidates,
    harmful: tuple[str, ...],
    harmless: tuple[str, ...],
) -> dict:
    """One row of the table: bypass (mean log-odds), bypass_p (mean probability), induce, induce_p, divergence in nats."""
    direction = candidates.direction(layer, position)
    intervention = operate(lm, direction, operation)
    bypass = refusal_log_odds(lm, first_slots(lm, harmful, [intervention]))
    induce = refusal_log_odds(lm, first_slots(lm, harmless, [add(direction)]))
    kl = divergence(_unsteered(lm, tuple(harmless)), first_slots(lm, harmless, [intervention]))
    return dict(
        bypass=bypass.mean().item(),
        bypass_p=bypass.sigmoid().mean().item(),
        induce=induce.mean().item(),
        induce_p=induce.sigmoid().mean().item(),
        divergence=kl.mean().item(),
    )


def select(table: pd.DataFrame, max_divergence: float = 0.3, min_auroc: float = 0.8, by: str = "bypass") -> pd.DataFrame:
    """The table with columns `kept` and `reason`, best cell first: lowest bypass (or highest induce) among the kept.

    Raises NothingSelected when no cell is kept.
    """
    table = table.copy()
    reasons = (
        {"auroc": table.auroc < min_auroc, "divergence": table.divergence > max_divergence}
        if by == "bypass"
        else {"auroc": table.auroc < min_auroc}
    )
    table["reason"] = ""
    for name, failed in reasons.items():
        table.loc[failed & (table.reason == ""), "reason"] = f"{name} out of bounds"
    table["kept"] = table.reason == ""
    if not table.kept.any():
        raise NothingSelected(
            f"none of {len(table)} candidates has auroc >= {min_auroc} and divergence <= {max_divergence}: best auroc "
            f"{table.auroc.max():.2f}, lowest divergence {table.divergence.min():.2f}. Loosen a bound or extract from more prompts."
        )
    order = table[by] if by == "bypass" else -table[by]
    return (
        table.assign(order=order)
        .sort_values(["kept", "order"], ascending=[False, True])
        .drop(columns="order")
        .reset_index(drop=True)
    )


@lru_cache(maxsize=2)
def _unsteered(lm: LanguageModel, harmless: tuple[str, ...]) -> Tensor:
    return first_slots(lm, harmless)
