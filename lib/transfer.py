"""Where else a direction is found and works: at other template positions, in a causal twin, in the other language.

What a direction of one position or language does beside another's is told by scores.py, on the same unseen prompts. What two
languages share is told by the cosine of their mean differences, between a floor (labels swapped at random) and a ceiling (one
language against itself).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm, rankdata

from .effects import Prompts
from .extraction import Candidates, Direction, activations, mean_difference
from .hooking import Site, capture
from .models import LanguageModel
from .prompts import Contrast, Language, encode, position_names
from .selection import NothingSelected, select
from .statistics import CONFIDENCE, auroc, random_directions

# --- template positions -------------------------------------------------------------------------------------------------------


def instruction_dependence(lm: LanguageModel, instructions: Sequence[str]) -> pd.DataFrame:
    """How far activations at template positions move with the instruction: rows prompt, position, name, deviation.

    deviation: largest over layers of |h - h of the first prompt| / |h of the first prompt|, at resid_pre of layer 1 and later
    (before that stand embeddings of the template). In a causal model it is 0 before the instruction, and exactly so: each prompt
    runs alone, filled up on the right to one width, so that equal values are also computed in the same order. (In batches, sums of
    other lengths may round differently.)
    """
    names = position_names(lm)
    rows = [encode(lm, [text]) for text in instructions]
    width = max(ids.shape[1] for ids, _ in rows) + 1  # one more, so that every row has padding and takes the masked attention
    sites = [Site(layer) for layer in range(1, lm.n_layers)]
    first, table = {}, []
    for prompt, (ids, mask) in enumerate(rows):
        length = ids.shape[1]
        fill = torch.full((1, width - length), lm.pad_id, device=ids.device)
        states = capture(lm, torch.cat([ids, fill], 1), sites, torch.cat([mask, torch.zeros_like(fill)], 1))
        for position, name in names.items():
            h = torch.stack([states[site][0, position % length] for site in sites]).float()  # [l, d]
            base = first.setdefault(position, h)
            deviation = ((h - base).norm(dim=-1) / base.norm(dim=-1)).max().item()
            table.append(dict(prompt=prompt, position=position, name=name, deviation=deviation))
    return pd.DataFrame(table[len(names) :])  # the first prompt is the one they are compared with


def separation(
    lm: LanguageModel, candidates: Candidates, prompts: Prompts, layers: Sequence[int], n_draws: int = 20, seed: int = 0
) -> pd.DataFrame:
    """AUROC of the projection on each candidate for prompts that did not make it: rows position, name, layer, auroc (lo, hi), n.

    Projections are centred within each language, which is no part of the question. null_q95: 95th percentile over `n_draws`
    random directions of max(AUROC, 1 - AUROC). Cells without a direction have no values.
    """
    sides = ("harmful", "harmless")
    x = {side: [activations(lm, of[side])[:, :, list(layers)] for of in prompts.values()] for side in sides}  # [n, p, l, d]
    randoms = random_directions(n_draws, lm.d_model, 1.0, seed)
    cells, names, rows = set(candidates.cells), position_names(lm), []
    for p, (position, name) in enumerate(names.items()):
        for at, layer in enumerate(layers):
            row = dict(
                position=position, name=name, layer=layer, auroc=None, auroc_lo=None, auroc_hi=None, n=None, null_q95=None
            )
            if (layer, position) in cells:
                vectors = torch.cat([candidates.difference[p, layer][None].float(), randoms])
                projected = {side: [h[:, p, at] @ vectors.T for h in x[side]] for side in sides}  # each [n, 1 + draws]
                centres = [(a.mean(0) + b.mean(0)) / 2 for a, b in zip(*projected.values(), strict=True)]
                harmful, harmless = (
                    torch.cat([h - centre for h, centre in zip(projected[side], centres, strict=True)]).double().numpy()
                    for side in sides
                )
                found = auroc(harmful[:, 0], harmless[:, 0], seed=seed, resamples=500)
                null = _auroc(harmful[:, 1:], harmless[:, 1:])
                row |= found.columns("auroc") | dict(n=found.n, null_q95=np.quantile(np.maximum(null, 1 - null), 0.95))
            rows.append(row)
    return pd.DataFrame(rows)


def choose(
    lm: LanguageModel,
    candidates: Candidates,
    harmful: Sequence[str],
    harmless: Sequence[str],
    positions: Sequence[int],
    stride: int,
    bounds: Sequence[float],
) -> Direction | None:
    """What selection.select picks among `positions`, under the first of `bounds` (nats of divergence) that any cell keeps to.

    None where none keeps to any: the caller says what that means.
    """
    for bound in bounds:
        with suppress(NothingSelected):
            found = select(lm, candidates, harmful, harmless, positions, stride, n_refined=1, max_divergence=bound)
            return found.direction().noting(chosen_by="scores", max_divergence=bound)
    return None


# --- two languages ------------------------------------------------------------------------------------------------------------


def candidates_by_source(lm: LanguageModel, train: Mapping[Language, Contrast]) -> dict[str, Candidates]:
    """Candidates of each language alone, and of all together ("pooled"): the means of their means, so of as many prompts each."""
    found = {language: mean_difference(lm, pairs.harmful, pairs.harmless) for language, pairs in train.items()}
    first = next(iter(found.values()))
    means = {
        name: torch.stack([getattr(candidates, name) for candidates in found.values()]).mean(0)
        for name in ("harmful_mean", "harmless_mean")
    }
    facts = dict(prompts=[candidates.provenance["prompts"] for candidates in found.values()], pooled=list(found))
    return found | dict(pooled=replace(first, **means, provenance=first.provenance | facts))


def by_role(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, and those of conditions named after a language once more: as "own" where that is the tested one, else as "other"."""
    single = rows[rows.condition.isin(rows.language.unique())]
    return pd.concat([rows, single.assign(condition=(single.condition == single.language).map({True: "own", False: "other"}))])


def language_cosines(lm: LanguageModel, a: Contrast, b: Contrast, resamples: int = 200, seed: int = 0) -> pd.DataFrame:
    """Cosine of two languages' mean differences at every cell, for the same twin pairs in both: rows position, name, layer, ...

    cosine            of all pairs, with limits: +-1.96 bootstrap standard errors of its Fisher transform, pairs resampled
    null_*, pvalue    the same with the labels of each language's pairs swapped at random
    other             one half of the pairs in `a` with the other half in `b`, mean over random halves: no shared requests
    ceiling_<a>, _<b> the same halves within one language: what `other` could reach at most, at its number of prompts
    """
    differences, size = [], 0.0  # [n, p, l, d], [p, l]
    for pairs in (a, b):
        x, y = activations(lm, pairs.harmful), activations(lm, pairs.harmless)
        differences.append((x - y).double().numpy())
        size = size + y.norm(dim=-1).mean(0).numpy() / 2
    n, rng = len(a.harmful), np.random.default_rng(seed)
    swaps = rng.choice([-1.0, 1.0], (2, resamples, n))
    drawn = rng.multinomial(n, [1 / n] * n, resamples).astype(float)
    half = (rng.random((resamples, n)).argsort(1) < n // 2).astype(float)
    rows = []
    for p, (position, name) in enumerate(position_names(lm).items()):
        for layer in range(lm.n_layers):
            u, v = (d[:, p, layer] for d in differences)
            if min(np.linalg.norm(u.mean(0)), np.linalg.norm(v.mean(0))) <= 1e-6 * size[p, layer]:
                continue  # no direction: the activations are the same for every prompt
            value = _cosines(u, v, np.ones((1, n)), np.ones((1, n)))[0]
            spread = np.arctanh(np.clip(_cosines(u, v, drawn, drawn), -1 + 1e-12, 1 - 1e-12)).std()
            centre, reach = np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12)), norm.ppf((1 + CONFIDENCE) / 2) * spread
            null = _cosines(u, v, *swaps)
            crossed = np.concatenate([_cosines(u, v, half, 1 - half), _cosines(u, v, 1 - half, half)])
            rows.append(
                {
                    "position": position,
                    "name": name,
                    "layer": layer,
                    "cosine": value,
                    "cosine_lo": np.tanh(centre - reach),
                    "cosine_hi": np.tanh(centre + reach),
                    "n": n,
                    "null_mean": null.mean(),
                    "null_q95": np.quantile(null, 0.95),
                    "pvalue": (1 + np.sum(null >= value)) / (1 + resamples),
                    "other": crossed.mean(),
                    f"ceiling_{a.language}": _cosines(u, u, half, 1 - half).mean(),
                    f"ceiling_{b.language}": _cosines(v, v, half, 1 - half).mean(),
                }
            )
    return pd.DataFrame(rows)


def _cosines(u: np.ndarray, v: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines [r] of the sums of rows u, v [n, d] under weights a, b [r, n]; from products [n, n], so d is paid for once."""

    def product(x, y, s, t):
        return np.einsum("rn,rn->r", s @ (x @ y.T), t)

    return product(u, v, a, b) / np.sqrt(product(u, u, a, a) * product(v, v, b, b))


def _auroc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """AUROC [k] of scores [n, k] from midranks."""
    n = len(positive)
    ranks = rankdata(np.concatenate([positive, negative]), axis=0)[:n]
    return (ranks.sum(0) - n * (n + 1) / 2) / (n * len(negative))
