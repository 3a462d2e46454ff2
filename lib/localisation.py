"""Where and when an intervention acts: one operation moved over layers, sites, tokens, steps and blocks.

A condition is a dict of facts, such as the layer and what is done there, with the draws of effects.py. Facts become columns of a
table with one row a prompt. `score` reads one forward pass, at the first step; a window of steps or blocks that opens later
cannot be seen there, so `write` makes texts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .effects import Draws
from .evaluation import divergence, first_slots, is_refusal, nats_per_token, refusal_log_odds, remembered
from .extraction import Candidates, Direction
from .hooking import Site, SiteName, capture
from .identity import canonical, plain
from .models import LanguageModel
from .prompts import Side, batches, encode
from .results import cached, sweep
from .sampling import respond
from .statistics import Interval, bootstrap, rate
from .steering import Intervention, ablate, clamp

Condition = tuple[Mapping, Draws]
Prompts = Mapping[Side, Sequence[str]]
Form = Literal["ablate", "clamp"]
SCORES = {"refusal": "harmful", "divergence": "harmless"}  # effect and damage: the column, and the prompts it is read on
TEXTS = {"refused": "harmful", "nats": "harmless"}
SUB_SITES: tuple[SiteName, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")


# --- interventions ------------------------------------------------------------------------------------------------------------


def placed(direction: Direction, form: Form, layers: int | Iterable[int] | None = None) -> Intervention:
    """Ablation (at its three sites) or clamping to the harmless mean (at resid_pre), at these layers (None: all)."""
    return ablate(direction, layers=layers) if form == "ablate" else clamp(direction, layers=layers)


def moved(draws: Draws, **changes) -> Draws:
    """The same draws with fields of every intervention replaced: layers=(3,), scope=Scope(steps=slice(0, 2))."""
    return [[replace(intervention, **changes) for intervention in draw] for draw in draws]


def at_sites(
    direction: Direction, form: Form, sites: Sequence[SiteName], means: Mapping[str, Tensor], layers: Iterable[int]
) -> list[Intervention]:
    """A direction ablated, or clamped to its projection of the site's harmless mean, at each of `sites` in each of `layers`.

    means: [l, d] of harmless prompts by site, see `site_means`. The mean of the residual stream would be a shock at a
    sub-module's output, which is a small part of it.
    """
    layers = tuple(layers)
    if form == "ablate":
        return [ablate(direction, sites, layers)]
    to = {site: (means[site].double() @ direction.basis.double().T).float() for site in sites}
    return [replace(clamp(direction, to[site], layers), sites=(site,)) for site in sites]


def layer_wise(candidates: Candidates, form: Form, first: int = 0, vectors: Tensor | None = None) -> list[Intervention]:
    """At resid_pre of every layer from `first` on, that layer's own direction (arXiv 2512.24143 v1; v2 has one for all).

    The directions are those of the candidates' only position; `vectors` [l, d] stand in for them in a control. Layers whose class
    means are equal, such as the embedding of a template token, have none.
    """
    (position,) = candidates.positions
    layers = [layer for layer, _ in candidates.cells if layer >= first]
    own = [candidates.direction(layer, position, None if vectors is None else vectors[[layer]]) for layer in layers]
    return [replace(placed(direction, form, direction.layer), sites=("resid_pre",)) for direction in own]


# --- extraction ---------------------------------------------------------------------------------------------------------------


def at_position(lm: LanguageModel, position: int, harmful: Sequence[str], harmless: Sequence[str]) -> Candidates:
    """What `mean_difference` finds at one template position, kept in the store of results."""
    return _candidates(lm, position, "resid_pre", position, harmful, harmless)


def over_prompt(lm: LanguageModel, position: int, harmful: Sequence[str], harmless: Sequence[str]) -> Candidates:
    """Class means of resid_pre pooled over all tokens of each prompt, template and instruction: their position is None.

    The recipe of arXiv 2512.24143 v1. `position` is one whose means are taken in the same pass, see `at_position`.
    """
    return _candidates(lm, position, "pooled", None, harmful, harmless)


def site_means(lm: LanguageModel, position: int, instructions: Sequence[str]) -> dict[str, Tensor]:
    """Mean activation [l, d] (float64) of each of SUB_SITES at a template position, and "pooled": resid_pre over all tokens.

    Kept in the store of results.
    """
    return cached("site-means", _site_means, lm=lm, position=position, instructions=tuple(instructions))


def _candidates(lm, position, name, label, harmful, harmless) -> Candidates:
    means = (site_means(lm, position, side)[name][None] for side in (harmful, harmless))
    provenance = dict(model=lm.name, n=[len(harmful), len(harmless)])
    return Candidates(*means, positions=(label,), fingerprint=lm.fingerprint, provenance=provenance)


def _site_means(lm: LanguageModel, position: int, instructions: Sequence[str], batch_size: int = 16) -> dict[str, Tensor]:
    sums = {name: torch.zeros(lm.n_layers, lm.d_model, dtype=torch.float64) for name in (*SUB_SITES, "pooled")}
    sites = [Site(layer, name) for layer in range(lm.n_layers) for name in SUB_SITES]
    for chosen in batches(lm, instructions, batch_size):
        ids, attention_mask = encode(lm, [instructions[i] for i in chosen])
        first = (attention_mask == 0).sum(1)
        columns = first + position if position >= 0 else torch.full_like(first, ids.shape[1] + position)
        rows = torch.arange(len(ids), device=lm.device)
        weights = (attention_mask / attention_mask.sum(1, keepdim=True)).double()
        for site, h in capture(lm, ids, sites, attention_mask).items():
            sums[site.name][site.layer] += h[rows, columns].double().sum(0).cpu()
            if site.name == "resid_pre":
                sums["pooled"][site.layer] += torch.einsum("bs,bsd->d", weights, h.double()).cpu()
    return {name: total / len(instructions) for name, total in sums.items()}


# --- measurements -------------------------------------------------------------------------------------------------------------


def score(lm: LanguageModel, conditions: Sequence[Condition], prompts: Prompts) -> pd.DataFrame:
    """One-forward scores of every condition: facts, side, prompt, draw, and refusal (probability, harmful prompts) or divergence
    from the unsteered model (nats, harmless prompts). Prompts are dealt out among a condition's draws."""
    return _swept("place", _score, conditions, lm=lm, prompts=prompts)


def write(
    lm: LanguageModel,
    conditions: Sequence[Condition],
    prompts: Prompts,
    scorer: LanguageModel,
    seed: int = 0,
    **decoding,
) -> pd.DataFrame:
    """Texts of every condition: facts, side, prompt, draw, refused (bool), and for harmless prompts nats a token under `scorer`.

    The texts are not kept: an unrefused answer to a harmful request has no place in a results table.
    """
    inputs = dict(lm=lm, prompts=prompts, scorer=scorer, seed=seed, decoding=decoding)
    return _swept("place-texts", _write, conditions, **inputs)


def estimates(rows: pd.DataFrame, by: Sequence[str], measures: Mapping[str, str] = SCORES, seed: int = 0) -> pd.DataFrame:
    """One row a group of `by` (in order of appearance): each measure on its side's prompts with _lo and _hi, and n_<side>.

    A rate has its Wilson interval, a mean its bootstrap one (95 %, over prompts); missing where fewer than two prompts have a value.
    """
    table = []
    for key, group in rows.groupby(list(by), sort=False, dropna=False):
        row = dict(zip(by, key, strict=True))
        for column, side in measures.items():
            values = group[group.side == side][column].dropna()
            row |= {f"n_{side}": len(values)} | dict.fromkeys((column, f"{column}_lo", f"{column}_hi"), np.nan)
            if len(values) > 1:
                binary = column == "refused"
                row |= (rate(values.astype(bool)) if binary else bootstrap(values, seed=seed)).columns(column)
        table.append(row)
    return pd.DataFrame(table)


def per_prompt(rows: pd.DataFrame, column: str, **facts) -> pd.Series:
    """Values of `column`, one a prompt in order, from the rows whose facts are as given (a collection: one of these).

    Where several rows of a prompt are left, such as those of many layers, their mean.
    """
    for name, value in facts.items():
        rows = rows[rows[name].isin([value] if isinstance(value, str | int) else list(value))]
    values = rows.dropna(subset=column).groupby("prompt")[column]
    return values.first() if values.size().eq(1).all() else values.mean()


def tell(table: pd.DataFrame, measures: Mapping[str, str] = SCORES) -> str:
    """A line for each row of `estimates`, for people."""
    measured = {f"{column}{limit}" for column in measures for limit in ("", "_lo", "_hi")}
    facts = [name for name in table if name not in measured | {f"n_{side}" for side in ("harmful", "harmless")}]
    lines = []
    for row in table.to_dict("records"):
        found = {
            column: Interval(row[column], row[f"{column}_lo"], row[f"{column}_hi"], int(row[f"n_{side}"]))
            for column, side in measures.items()
            if pd.notna(row[column])
        }
        about = [row[name] for name in facts if pd.notna(row[name])]
        about = [f"{value:.0f}" if isinstance(value, float) else str(value) for value in about]
        lines.append(f"{', '.join(about)}: " + "; ".join(f"{column} {interval}" for column, interval in found.items()))
    return "\n".join(lines)


def _swept(name: str, function: Callable, conditions: Sequence[Condition], **inputs) -> pd.DataFrame:
    draws = {canonical(plain(facts, "facts")): steer for facts, steer in conditions}
    return sweep(name, function, [facts for facts, _ in conditions], draws=draws, **inputs)


def _score(lm: LanguageModel, draws: Mapping[str, Draws], prompts: Prompts, **facts) -> list[dict]:
    rows = []
    for side, draw, interventions, numbers, asked in _dealt(draws[canonical(facts)], prompts):
        steered = first_slots(lm, asked, interventions) if interventions else _unsteered(lm, asked)
        if side == "harmful":
            values, column = refusal_log_odds(lm, steered).sigmoid(), "refusal"
        else:
            values, column = divergence(_unsteered(lm, asked), steered), "divergence"
        known = dict(side=side, draw=draw)
        rows += [known | dict(prompt=i) | {column: x} for i, x in zip(numbers, values.tolist(), strict=True)]
    return rows


def _write(
    lm: LanguageModel,
    draws: Mapping[str, Draws],
    prompts: Prompts,
    scorer: LanguageModel,
    seed: int,
    decoding: Mapping,
    **facts,
) -> list[dict]:
    rows = []
    for side, draw, interventions, numbers, asked in _dealt(draws[canonical(facts)], prompts):
        texts = respond(lm, asked, interventions, seed, **decoding)
        nats = nats_per_token(scorer, asked, texts) if side == "harmless" else [float("nan")] * len(texts)
        known = dict(side=side, draw=draw)
        rows += [
            known | dict(prompt=i, refused=is_refusal(text), nats=x) for i, text, x in zip(numbers, texts, nats, strict=True)
        ]
    return rows


def _dealt(draws: Draws, prompts: Prompts) -> Iterator[tuple[Side, int, Sequence[Intervention], range, tuple[str, ...]]]:
    """(side, draw, interventions, prompt numbers, prompts) of every draw that gets any."""
    for side, instructions in prompts.items():
        for draw, interventions in enumerate(draws):
            numbers = range(draw, len(instructions), len(draws))
            if numbers:
                yield side, draw, interventions, numbers, tuple(instructions[i] for i in numbers)


@remembered(32)
def _unsteered(lm: LanguageModel, instructions: tuple[str, ...]) -> Tensor:
    return first_slots(lm, instructions)
