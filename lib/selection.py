"""Which direction and which operation: every candidate is scored by single forward passes, and the whole table is kept.

The three scores of arXiv 2406.11717, read where a masked diffusion model shows them, at the first masked response slots:

    bypass      refusal log-odds on harmful prompts under the operation                  (lower is better)
    induce      the same on harmless prompts with the direction added at its own layer   (higher is better)
    divergence  KL to the unsteered model on harmless prompts                            (a bound: broken text does not refuse)

and a fourth, `auroc` of the projection on prompts that did not make the direction: effect without discrimination is damage (an
attention sink that is ablated takes refusals to zero, and the model with it).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from .evaluation import divergence, first_slots, is_refusal, refusal_log_odds, unsteered
from .extraction import Candidates, Direction, activations
from .models import LanguageModel
from .results import sweep
from .sampling import respond
from .statistics import bootstrap
from .steering import Intervention, ablate, add, clamp

OPERATIONS = {
    "ablate everywhere": lambda d: ablate(d),
    "ablate at its layer": lambda d: ablate(d, ("resid_pre",), d.layer),
    "clamp from its layer": lambda d: clamp(d, layers=range(d.layer, len(d.reference))),
}
CELL = ["layer", "position"]
SCORES = ("auroc", "bypass", "induce", "divergence", "refused")


class NothingSelected(ValueError):
    """No candidate passes the thresholds; the message says what failed and how close the best came."""


@dataclass(frozen=True, eq=False)
class Selection:
    """A scored grid. table: a row for each (layer, position, operation), best first, with its scores, `kept` and `reason`."""

    table: pd.DataFrame
    candidates: Candidates

    @property
    def best(self) -> pd.Series:
        """The first row of the table."""
        return self.table.iloc[0]

    @property
    def finalists(self) -> pd.DataFrame:
        """The best kept row of each operation."""
        return self.table[self.table.kept].groupby("operation", sort=False).head(1).reset_index(drop=True)

    def direction(self, row: int = 0) -> Direction:
        """The direction of a row of the table (0: the best), with its scores in the provenance."""
        cell = self.table.iloc[row]
        scores = {name: float(cell[name]) for name in SCORES if name in cell and pd.notna(cell[name])}
        direction = self.candidates.direction(int(cell.layer), int(cell.position))
        return direction.noting(operation=cell.operation, scores=scores)

    def intervention(self, row: int = 0) -> Intervention:
        """The operation of a row of the table (0: the best) with its direction."""
        return operate(self.direction(row), self.table.operation.iloc[row])


def operate(direction: Direction, operation: str) -> Intervention:
    """The named operation of OPERATIONS with a direction."""
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation!r}; use one of {', '.join(OPERATIONS)}")
    return OPERATIONS[operation](direction)


def select(
    lm: LanguageModel,
    candidates: Candidates,
    harmful: Sequence[str],
    harmless: Sequence[str],
    positions: Sequence[int] | None = None,
    stride: int = 4,
    n_coarse: int = 8,
    n_refined: int = 2,
    max_divergence: float = 0.3,
    min_auroc: float = 0.8,
    min_induce: float | None = None,
) -> Selection:
    """Score the candidates of every `stride`-th layer on `n_coarse` prompts a class, then the neighbourhood of the best on all.

    Prompts must be other ones than those behind `candidates`. The `n_refined` best coarse cells of each operation, by refusal score
    plus excess over the bounds, are scored again with their neighbours (less than `stride` layers away), and only refined cells
    can be kept: divergence <= max_divergence (nats), auroc >= min_auroc, and induce >= min_induce where it is given. Scores are
    kept in the store of results, so a selection that is killed goes on, and one that was made before is read.
    Raises NothingSelected when no cell is kept, ValueError for positions that the template does not have.
    """
    positions = candidates.positions if positions is None else positions
    if unknown := set(positions) - set(candidates.positions):
        raise ValueError(f"positions {sorted(unknown)} are not in the template; use some of {candidates.positions}")
    areas = discrimination(lm, candidates, harmful, harmless)
    asked = areas[areas.position.isin(positions)]
    useful = asked[asked.auroc >= min_auroc]
    if useful.empty:
        raise NothingSelected(f"no cell tells harmful from harmless prompts: best auroc {asked.auroc.max():.2f} < {min_auroc}")

    def scored(cells: pd.DataFrame, n: int) -> pd.DataFrame:
        cells = cells.sort_values("layer", kind="stable")  # scores of one layer in a row share the blocks before it
        prompts = dict(harmful=_thinned(harmful, n), harmless=_thinned(harmless, n))
        grid = [dict(layer=int(c.layer), position=int(c.position)) for c in cells.drop_duplicates(CELL).itertuples()]
        induced = sweep("induce", score_addition, grid, lm=lm, candidates=candidates, harmless=prompts["harmless"])
        rows = [dict(layer=int(c.layer), position=int(c.position), operation=c.operation) for c in cells.itertuples()]
        removed = sweep("bypass", score_removal, rows, lm=lm, candidates=candidates, **prompts)
        return removed.merge(induced, on=CELL).merge(areas, on=CELL)

    grid = useful.merge(pd.DataFrame(dict(operation=list(OPERATIONS))), how="cross")
    thinned = grid[grid.layer % stride == stride - 1]
    coarse = scored(grid if thinned.empty else thinned, n_coarse)
    beyond = (coarse.divergence - max_divergence).clip(lower=0)
    if min_induce is not None:
        beyond += (min_induce - coarse.induce).clip(lower=0)
    best = (
        coarse.assign(merit=coarse.bypass_p + beyond).sort_values("merit", kind="stable").groupby("operation").head(n_refined)
    )
    near = grid.merge(best[[*CELL, "operation"]], on=["position", "operation"], suffixes=("", "_best"))
    near = near[(near.layer - near.layer_best).abs() < stride].drop_duplicates([*CELL, "operation"])
    refined = scored(near, len(harmful))
    return Selection(_judged(coarse, refined, max_divergence, min_auroc, min_induce), candidates)


def confirm(lm: LanguageModel, selection: Selection, harmful: Sequence[str], **decoding) -> Selection:
    """The same selection with its finalists ranked by the share of `harmful` that their texts refuse (column `refused`).

    A score is read before the first token is written; what counts is the text. Divergence breaks ties.
    """
    cells = selection.finalists[[*CELL, "operation"]].to_dict("records")
    texts = sweep("confirm", _refused, cells, lm=lm, candidates=selection.candidates, harmful=harmful, **decoding)
    table = selection.table.merge(texts, on=[*CELL, "operation"], how="left")
    return Selection(table.sort_values(["refused", "divergence"], kind="stable").reset_index(drop=True), selection.candidates)


def discrimination(lm: LanguageModel, candidates: Candidates, harmful: Sequence[str], harmless: Sequence[str]) -> pd.DataFrame:
    """AUROC of the projection on each candidate, for prompts that did not make it: rows layer, position, auroc."""
    x = torch.cat([activations(lm, harmful), activations(lm, harmless)])  # [n, p, l, d]
    labels = [1] * len(harmful) + [0] * len(harmless)
    projections = torch.einsum("npld,pld->npl", x, candidates.difference.float())
    return pd.DataFrame(
        dict(
            layer=layer,
            position=position,
            auroc=roc_auc_score(labels, projections[:, candidates.positions.index(position), layer]),
        )
        for layer, position in candidates.cells
    )


def score_removal(
    layer: int,
    position: int,
    operation: str,
    lm: LanguageModel,
    candidates: Candidates,
    harmful: Sequence[str],
    harmless: Sequence[str],
) -> dict:
    """The scores of one cell under one operation: see `removal_scores`."""
    return removal_scores(lm, operate(candidates.direction(layer, position), operation), harmful, harmless)


def removal_scores(lm: LanguageModel, intervention: Intervention, harmful: Sequence[str], harmless: Sequence[str]) -> dict:
    """bypass (mean log-odds), bypass_p (mean probability) and divergence (mean, nats) of one intervention; n prompts in all.

    The last two with _lo and _hi, 95 % bootstrap limits over prompts.
    """
    log_odds = refusal_log_odds(lm, first_slots(lm, harmful, [intervention]))
    kl = divergence(unsteered(lm, tuple(harmless)), first_slots(lm, harmless, [intervention]))
    facts = dict(bypass=log_odds.mean().item(), n=len(harmful) + len(harmless))
    return facts | bootstrap(log_odds.sigmoid().tolist()).columns("bypass_p") | bootstrap(kl.tolist()).columns("divergence")


def score_addition(
    layer: int,
    position: int,
    lm: LanguageModel,
    candidates: Candidates,
    harmless: Sequence[str],
    strength: float = 1.0,
    at: int | None = None,
) -> dict:
    """induce (mean log-odds) and induce_p (mean probability, with limits) of adding one cell's direction at layer `at`.

    By default that is the cell's own layer.
    """
    addition = add(candidates.direction(layer, position), strength, layer=at)
    log_odds = refusal_log_odds(lm, first_slots(lm, harmless, [addition]))
    return dict(induce=log_odds.mean().item()) | bootstrap(log_odds.sigmoid().tolist()).columns("induce_p")


def _refused(layer, position, operation, lm, candidates, harmful, **decoding) -> dict:
    steer = [operate(candidates.direction(layer, position), operation)]
    refused = [is_refusal(text) for text in respond(lm, harmful, steer, **decoding)]
    return dict(refused=sum(refused) / len(refused), n_texts=len(refused))


def _judged(coarse, refined, max_divergence, min_auroc, min_induce) -> pd.DataFrame:
    """Both stages in one table, kept cells first, each rejected one with its reason."""
    done = set(map(tuple, refined[[*CELL, "operation"]].to_numpy()))
    passed_over = coarse[[tuple(row) not in done for row in coarse[[*CELL, "operation"]].to_numpy()]]
    table = pd.concat([refined.assign(stage="refined"), passed_over.assign(stage="coarse")], ignore_index=True)
    reason = pd.Series("", index=table.index)
    reason[table.divergence > max_divergence] = f"divergence > {max_divergence}"
    if min_induce is not None:
        reason[(reason == "") & (table.induce < min_induce)] = f"induce < {min_induce}"
    reason[(reason == "") & (table.stage == "coarse")] = "not among the best of the coarse grid"
    table = table.assign(kept=reason == "", reason=reason)
    if not table.kept.any():
        near = table[table.stage == "refined"].nsmallest(1, "divergence").iloc[0]
        raise NothingSelected(
            f"none of {len(refined)} refined cells keeps to the bounds (divergence <= {max_divergence}"
            f"{'' if min_induce is None else f', induce >= {min_induce}'}): the gentlest, layer {near.layer} position {near.position} "
            f"{near.operation!r}, has divergence {near.divergence:.2f}, bypass {near.bypass:.2f}, induce {near.induce:.2f}. "
            "Loosen a bound, refine more cells, or extract from more prompts."
        )
    return table.sort_values(["kept", "bypass"], ascending=[False, True], kind="stable").reset_index(drop=True)


def _thinned(prompts: Sequence[str], n: int) -> tuple[str, ...]:
    """`n` of the prompts (all, if there are fewer) at even distances: every language of a pooled list stays in."""
    n = min(n, len(prompts))
    return tuple(prompts[i * len(prompts) // n] for i in range(n))
