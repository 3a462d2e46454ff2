"""Is it one direction? Principal components at every cell, and how many dimensions ablation needs.

arXiv 2512.24143 reads one-dimensionality off the share of the first principal component and its cosine with the mean difference.
Both are high for any contrast that dominates the variance, so each stands beside its value under shuffled labels and the AUROC
on prompts that did not make the direction. Should one direction be too few, `paired_components` and `learnt_subspace` offer more.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .evaluation import canvases, divergence, refusal_log_odds, slot_log_probabilities
from .extraction import Candidates, Direction, activations, orthonormal, principal_components
from .models import LanguageModel
from .prompts import Contrast, Language, position_names
from .selection import operate, removal_scores
from .statistics import auroc, one_dimensionality, random_directions
from .steering import steering

SHUFFLES = 999  # so that a p-value can be small enough to survive a correction over a whole table of claims


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
            facts = one_dimensionality(both, labels, seed=seed, resamples=resamples, shuffles=SHUFFLES)
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


def paired_components(harmful: Tensor, harmless: Tensor, k: int) -> Tensor:
    """The k orthonormal directions [k, d] that hold most of the differences of twins harmful[i] - harmless[i], each side [n, d].

    Not centred, for the mean difference is part of what they hold: the first one is close to it.
    """
    return torch.linalg.svd((harmful - harmless).double(), full_matrices=False).Vh[:k].float()


def learnt_subspace(
    lm: LanguageModel,
    candidates: Candidates,
    layer: int,
    position: int,
    operation: str,
    start: Tensor,
    harmful: Sequence[str],
    harmless: Sequence[str],
    steps: int = 24,
    rate: float = 0.01,
    price: float = 1.0,
) -> dict[str, Tensor]:
    """k orthonormal directions found by gradient descent from `start` [k, d], for one operation at a cell of `candidates`.

    The loss, in nats: -log P(no refusal) of the harmful prompts, plus `price` times the divergence of the harmless ones from the
    unsteered model, both as one-forward scores. (Log-odds themselves would go on paying where refusal is long gone.) Adam with
    learning rate `rate` on vectors that are made orthonormal before each use; scales and harmless means stay the cell's own, and no
    parameter of the model gets a gradient. arXiv 2502.17420 looks for directions by gradient, and finds more than one.

    Returns basis [k, d], and before each step refusal (mean -log P(no refusal)) and divergence (mean), [steps] each.
    """
    vectors = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([vectors], lr=rate)
    first = operate(candidates.direction(layer, position, start), operation).first_layer
    with torch.no_grad():
        sides = [canvases(lm, prompts, first, len(prompts))[0][1:] for prompts in (harmful, harmless)]  # one batch a side
        plain = slot_log_probabilities(lm, sides[1][1])
    course = []
    for _ in range(steps):
        steer = operate(candidates.direction(layer, position, vectors), operation)
        with torch.enable_grad(), steering(lm, [steer]) as at:
            scored = []
            for state, entry in sides:
                at(state)
                scored.append(slot_log_probabilities(lm, entry))
            refusal = F.softplus(refusal_log_odds(lm, scored[0])).mean()
            damage = divergence(plain, scored[1]).mean()
            optimiser.zero_grad()
            (refusal + price * damage).backward()
        optimiser.step()
        course.append([refusal.item(), damage.item()])
    refusals, damages = torch.tensor(course).T
    return dict(basis=orthonormal(vectors.detach()), refusal=refusals, divergence=damages)
