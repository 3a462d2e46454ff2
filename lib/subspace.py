"""Is it one direction? Principal components at every cell, and how many dimensions ablation needs.

arXiv 2512.24143 reads one-dimensionality off the share of the first principal component and its cosine with the mean difference.
Both are high for any contrast that dominates the variance, so each stands beside its value under shuffled labels and the AUROC
on prompts that did not make the direction.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .extraction import Candidates, Direction, activations, principal_components
from .models import LanguageModel
from .prompts import Contrast, Language, position_names
from .selection import operate, removal_scores
from .statistics import auroc, one_dimensionality, random_directions


def dimensionality(
    language: Language,
    lm: LanguageModel,
    train: Mapping[Language, Contrast],
    held_out: Mapping[Language, Contrast],
    layers: Sequence[int],
    seed: int = 0,
    resamples: int = 100,
) -> list[dict]:
    """Rows for each template position, layer and quantity (see statistics.one_dimensionality; "AUROC" is on `held_out`): value, lo,
    hi, n, and what shuffled labels give (null_mean, null_q95, pvalue) where a quantity has that.

    Cells whose activations are the same for every prompt are left out: the first token, and in a causal model every one before
    the instruction.
    """
    x, y = (
        [activations(lm, side) for side in (pairs.harmful, pairs.harmless)] for pairs in (train[language], held_out[language])
    )
    labels = [True] * len(x[0]) + [False] * len(x[1])
    rows = []
    for p, (position, name) in enumerate(position_names(lm).items()):
        for layer in layers:
            both = torch.cat([side[:, p, layer] for side in x])
            if both.std(0).max() < 1e-6 * both.abs().max():
                continue
            facts = one_dimensionality(both, labels, seed=seed, resamples=resamples, shuffles=resamples)
            difference = x[0][:, p, layer].mean(0) - x[1][:, p, layer].mean(0)
            held = auroc(*((side[:, p, layer] @ difference).tolist() for side in y), seed=seed)
            quantities = {
                "PC1 share": facts["pc1_share"],
                "difference's share": facts["difference_share"],
                "|cos(PC1, difference)|": facts["cosine"],
                "AUROC": held,
            }
            for quantity, found in quantities.items():
                null = {name: getattr(found, name, None) for name in ("null_mean", "null_q95", "pvalue")}
                limits = dict(value=found.value, lo=found.lo, hi=found.hi, n=found.n)
                rows.append(dict(position=position, name=name, layer=layer, quantity=quantity) | limits | null)
    return rows


def ablated_dimensions(
    k: int,
    kind: Literal["difference first", "without the difference", "random"],
    lm: LanguageModel,
    candidates: Candidates,
    direction: Direction,
    operation: str,
    x: Tensor,
    harmful: Sequence[str],
    harmless: Sequence[str],
    seed: int = 0,
) -> dict:
    """Scores (selection.removal_scores) of removing k dimensions at a direction's cell: is the mean difference enough?

    x: activations [n, d] of that cell. "difference first" removes the mean difference and the k - 1 principal components of what
    it leaves of x; "without the difference" removes k of those components alone; "random" k random dimensions, the control.
    """
    axis = direction.basis[0].double()
    components, _ = principal_components(x.double() - (x.double() @ axis)[:, None] * axis)
    vectors = {
        "difference first": torch.cat([direction.basis, components[: k - 1]]),
        "without the difference": components[:k],
        "random": random_directions(k, lm.d_model, 1.0, seed),
    }[kind]
    subspace = candidates.direction(direction.layer, direction.position, vectors)
    return removal_scores(lm, operate(subspace, operation), harmful, harmless)
