"""A direction in another model: the best linear map between two residual streams, and what a carried direction does there.

A direction belongs to the weights it was made from. `carry` takes it to another model, as it is or along the linear map that best
foretells the target's activations from the source's. Its strength is in the target's own unit there, the distance of the target's
class means, so that a dose means the same for the target's own direction, a carried one and a random one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from .extraction import Candidates, Direction, DirectionMismatch, activations
from .models import LanguageModel
from .prompts import Contrast, template
from .selection import removal_scores
from .statistics import Controlled
from .steering import add

PENALTIES = tuple(
    10.0**power for power in range(-4, 3)
)  # in mean squared activations a dimension, so that no model's scale counts


@dataclass(frozen=True, eq=False)
class Stream:
    """Activations of one model at its template positions, [n, p, l, d] float32 each, and the candidate directions they give.

    harmful[i] and harmless[i] are twins; held_out are harmless prompts that made no direction and fitted no map. Streams that are
    compared have the same prompts in the same order.
    """

    harmful: Tensor
    harmless: Tensor
    held_out: Tensor
    candidates: Candidates

    @property
    def n_layers(self) -> int:
        return self.harmful.shape[2]

    @property
    def d_model(self) -> int:
        return self.harmful.shape[3]

    def at(self, position: int) -> int:
        """Where a template position stands in the tensors."""
        return self.candidates.positions.index(position)


@dataclass(frozen=True, eq=False)
class Map:
    """y ~ matrix x, for changes x [d] of the source's stream and y [e] of the target's.

    explained: share of the variance of held-out prompts in the target that it foretells. penalty: the ridge's, see PENALTIES.
    """

    matrix: Tensor  # [e, d]
    explained: float
    penalty: float


def stream(lm: LanguageModel, pairs: Contrast, held_out: Sequence[str]) -> Stream:
    """The stream of `lm` for twin pairs, one forward pass a prompt."""
    sides = [activations(lm, prompts) for prompts in (pairs.harmful, pairs.harmless)]
    candidates = Candidates(
        *(side.double().mean(0) for side in sides),
        positions=template(lm).positions,
        fingerprint=lm.fingerprint,
        provenance=dict(model=lm.name, language=pairs.language, split=pairs.split, n=[len(side) for side in sides]),
    )
    return Stream(*sides, activations(lm, held_out), candidates)


def same_depth(layer: int, source: Stream, target: Stream) -> int:
    """The layer of `source` at the depth of the target's `layer`."""
    return layer * source.n_layers // target.n_layers


def fit(x: Tensor, y: Tensor, x_held: Tensor, y_held: Tensor) -> Map:
    """Ridge regression from x [n, p, d] to y [n, p, e], of the same prompts; the penalty that suits the held-out prompts best.

    Each position is centred on its own mean: what distinguishes positions is nearly all of the variance, and no map of directions.
    """
    (x, x_held), (y, y_held) = _centred(x, x_held), _centred(y, y_held)
    unit, best = np.square(x).sum() / x.shape[1], None
    for penalty in PENALTIES:
        matrix = Ridge(alpha=penalty * unit, fit_intercept=False).fit(x, y).coef_
        explained = 1 - np.square(y_held - x_held @ matrix.T).sum() / np.square(y_held).sum()
        if best is None or explained > best.explained:
            best = Map(torch.from_numpy(matrix).float(), float(explained), penalty)
    return best


def best_map(source: Stream, target: Stream, layer: int) -> Map:
    """The map to the target's `layer` from the same depth of the source, fitted on harmless prompts alone.

    Positions: those behind the instruction that both templates have. Before it a causal model has nothing to say.
    """
    shared = [q for q in target.candidates.positions if q < 0 and q in source.candidates.positions]
    if not shared:
        raise ValueError("the two templates have no position behind the instruction in common")

    (x, x_held), (y, y_held) = (
        [side[:, [of.at(q) for q in shared], at] for side in (of.harmless, of.held_out)]
        for of, at in ((source, same_depth(layer, source, target)), (target, layer))
    )
    return fit(x, y, x_held, y_held)


def carry(direction: Direction, candidates: Candidates, layer: int, matrix: Tensor | None = None) -> Direction:
    """The direction in the model of `candidates`, to be used at `layer`: as it is, or taken along `matrix` [e, d].

    Of the source only the direction is left: length, scale and harmless means are the target's, at the same template position.
    Raises DirectionMismatch where the widths do not fit.
    """
    vectors = direction.basis if matrix is None else direction.basis @ matrix.T.to(direction.basis)
    if vectors.shape[1] != candidates.difference.shape[-1]:
        raise DirectionMismatch(f"a direction of d = {vectors.shape[1]} in a stream of d = {candidates.difference.shape[-1]}")
    moved = candidates.direction(layer, direction.position, vectors)
    return moved.noting(
        carried_from=direction.provenance.get("model"), carried_layer=direction.layer, mapped=matrix is not None
    )


def agreement(
    source: str,
    target: str,
    layer: int,
    streams: Mapping[str, Stream],
    position: int,
    seed: int = 0,
    resamples: int = 1000,
) -> list[dict]:
    """Cosine of the source's direction, as it is and mapped, with the target's own at its `layer`, and the map's `explained`.

    Rows for each way (how) with value, lo, hi, n and the null: the source's direction from twins that have swapped labels at random.
    Limits: 95 %, pairs resampled with the map as it is, normal on Fisher's scale (resampling itself lowers a cosine).
    """
    one, other = streams[source], streams[target]
    found = best_map(one, other, layer)
    theirs, own = (
        (of.harmful[:, of.at(position), at] - of.harmless[:, of.at(position), at]).double()
        for of, at in ((one, same_depth(layer, one, other)), (other, layer))
    )
    ways = {"mapped": theirs @ found.matrix.double().T}
    if one.d_model == other.d_model:
        ways = {"raw": theirs} | ways
    rows = []
    for how, carried in ways.items():
        cosine = _cosine_of_means(carried, own, seed, resamples)
        null = {name: getattr(cosine, name) for name in ("null_mean", "null_q95", "pvalue")}
        limits = dict(value=cosine.value, lo=cosine.lo, hi=cosine.hi, n=cosine.n)
        rows.append(dict(how=how) | limits | null | dict(explained=found.explained, penalty=found.penalty))
    return rows


def dose_response(
    strength: float, lm: LanguageModel, direction: Direction, harmful: Sequence[str], harmless: Sequence[str]
) -> dict:
    """Scores (selection.removal_scores) of a direction at its layer, in distances of the class means there; n prompts a side.

    removed: refusal of harmful prompts with `strength` subtracted; divergence: of harmless ones under the same, all of it damage.
    induced, induced_divergence: of harmless prompts with `strength` added, where a refusal is a change too.
    """
    down = removal_scores(lm, add(direction, -strength), harmful, harmless)
    up = removal_scores(lm, add(direction, strength), harmless, harmless)
    named = [("removed", down, "bypass_p"), ("divergence", down, "divergence")]
    named += [("induced", up, "bypass_p"), ("induced_divergence", up, "divergence")]
    columns = {f"{name}{limit}": scores[f"{score}{limit}"] for name, scores, score in named for limit in ("", "_lo", "_hi")}
    return dict(n=len(harmful)) | columns


def _centred(seen: Tensor, held: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both [n, p, d] around the means of `seen` at each position, as rows [n * p, d]."""
    return tuple((part.double() - seen.double().mean(0)).flatten(0, 1).numpy() for part in (seen, held))


def _cosine_of_means(a: Tensor, b: Tensor, seed: int, resamples: int) -> Controlled:
    """Cosine of the means of a and b [n, d], row i of both from pair i; null: signs of the rows of a at random."""
    n, generator = len(a), torch.Generator().manual_seed(seed)

    def cosine(left: Tensor, right: Tensor) -> Tensor:
        return torch.cosine_similarity(left @ a, right @ b, dim=-1)

    every = torch.ones(1, n, dtype=torch.float64)
    value = cosine(every, every).item()
    picks = torch.randint(n, (resamples, n), generator=generator)
    counts = torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    signs = torch.randint(2, (resamples, n), generator=generator).double() * 2 - 1
    null = cosine(signs, every)
    fisher = [np.arctanh(np.clip(v, -1 + 1e-9, 1 - 1e-9)) for v in (value, cosine(counts, counts).numpy())]
    lo, hi = np.tanh(fisher[0] + np.array([-1.96, 1.96]) * fisher[1].std())
    pvalue = (1 + (null >= value).sum().item()) / (1 + resamples)
    limits = (value, float(min(lo, value)), float(max(hi, value)), n)
    return Controlled(*limits, null.mean().item(), null.quantile(0.95).item(), pvalue)
