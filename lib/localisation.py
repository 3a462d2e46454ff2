"""Where and when an intervention acts: one operation moved over layers, sites, tokens, steps and blocks.

`scores.score` reads one forward pass, at the first step; a window of steps or blocks that opens later cannot be seen there, so
`write` makes texts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from .effects import Draws
from .evaluation import is_refusal, nats_per_token
from .extraction import Candidates, Direction
from .hooking import Site, SiteName, capture
from .models import LanguageModel
from .prompts import Side, batches, encode
from .results import cached
from .sampling import respond
from .scores import Condition, Prompts, measured
from .steering import Intervention, ablate, clamp

Form = Literal["ablate", "clamp"]
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


# --- texts --------------------------------------------------------------------------------------------------------------------


def write(
    lm: LanguageModel,
    conditions: Sequence[Condition],
    prompts: Prompts,
    scorer: LanguageModel,
    seed: int = 0,
    **decoding,
) -> pd.DataFrame:
    """Texts of every condition, in rows of `scores.measured`: refused (bool), and for harmless prompts nats a token under `scorer`.

    The texts are not kept: an unrefused answer to a harmful request has no place in a results table.
    """
    inputs = dict(lm=lm, scorer=scorer, seed=seed, decoding=decoding)
    return measured("texts", _write, conditions, prompts, **inputs)


def _write(
    side: Side,
    instructions: Sequence[str],
    numbers: Sequence[int],
    interventions: Sequence[Intervention],
    lm: LanguageModel,
    scorer: LanguageModel,
    seed: int,
    decoding: Mapping,
) -> dict:
    asked = [instructions[i] for i in numbers]
    texts = respond(lm, asked, interventions, seed, **decoding)
    nats = nats_per_token(scorer, asked, texts) if side == "harmless" else [None] * len(texts)
    return dict(refused=list(map(is_refusal, texts)), nats=nats)
