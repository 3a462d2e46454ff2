"""A direction read where the response will stand: at masked slots behind the prompt, instead of in the prompt alone.

A canvas holds a prompt and a response, a share of whose slots is masked; the state is the mean of resid_pre over the masked ones.
arXiv 2605.13043 reads there, at mask ratios .3 to .9, refusal minus compliance with the prompt held fixed. No harmful answer is
written here, so that its contrast is taken on harmless prompts, beside one in which the prompt tells the classes apart too:

    prompts, texts   a harmful prompt and a refusal, against its harmless twin and that one's own answer
    texts            a harmless prompt and a refusal, against the same prompt and its own answer

At ratio 1 no text is left: what "prompts, texts" then finds is what the slots know of the prompt at denoising step 0.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .evaluation import CANVAS
from .extraction import Candidates, Direction
from .hooking import Site, capture
from .models import LanguageModel
from .paths import PROMPTS
from .prompts import Contrast, Language, Split, batches, encode
from .results import cached

Kind = Literal["prompts, texts", "texts"]
# Longer than a canvas, as the answers are: an end of text among the slots would tell the classes apart by their lengths.
REFUSAL: dict[Language, str] = {
    "en": "I'm sorry, but I can't help with that. It could hurt somebody, and I would rather help with something that does not.",
    "zh": "很抱歉，我不能帮你做这件事，因为这可能会伤害别人。如果你有别的问题，我很乐意帮忙。",
}


def answers(split: Split) -> dict[str, str]:
    """The answer to each harmless request of a split of data/prompts/contrast.jsonl that has one, in both languages."""
    lines = (PROMPTS / "contrast.jsonl").read_text(encoding="utf8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == split]
    found = {row[f"{code}_harmless"]: row[f"{code}_answer"] for row in rows for code in ("en", "zh")}
    return {request: answer for request, answer in found.items() if request and answer}


def slot_states(
    lm: LanguageModel, instructions: Sequence[str], responses: Sequence[str], ratio: float, seed: int = 0, batch_size: int = 32
) -> Tensor:
    """Mean of resid_pre over the masked slots, every layer: [n, l, d] float32 on the CPU.

    `ratio` of the CANVAS slots are masked (one at least), the others hold the response's first tokens, filled up with ends of
    text. Which ones is drawn anew for prompt i from seed + i: the same for both classes, so that the pattern tells nothing.
    """
    sites, states = [Site(layer) for layer in range(lm.n_layers)], {}
    for rows in batches(lm, instructions, batch_size):
        ids, attention_mask = encode(lm, [instructions[i] for i in rows], CANVAS)
        masked = torch.stack([masked_slots(ratio, seed + i) for i in rows]).to(lm.device)
        text = torch.tensor([_slots(lm, responses[i]) for i in rows], device=lm.device)
        ids[:, -CANVAS:] = torch.where(masked, lm.mask_id, text)
        weights = masked / masked.sum(1, keepdim=True)
        captured = capture(lm, ids, sites, attention_mask)
        means = [torch.einsum("bs,bsd->bd", weights, captured[site][:, -CANVAS:].float()) for site in sites]
        states |= zip(rows, torch.stack(means, 1).cpu(), strict=True)
    return torch.stack([states[i] for i in range(len(instructions))])


def masked_slots(ratio: float, seed: int) -> Tensor:
    """Which of the CANVAS slots are masked, [CANVAS] bool: `ratio` of them, one at least."""
    order = torch.randperm(CANVAS, generator=torch.Generator().manual_seed(seed))
    return order < max(1, round(ratio * CANVAS))


def masked_candidates(
    lm: LanguageModel, kind: Kind, ratio: float, train: Mapping[Language, Contrast], seed: int = 0
) -> Candidates:
    """Candidates at the masked slots for twins of `train`, kept in the store of results: a template position that is None.

    The class called harmful is the one with refusals, also where its prompts are harmless ("texts"). The harmless requests of `train`
    must be of the train split, whose answers are used; KeyError for another.
    """
    own = answers("train")
    means = {}
    for side in ("harmful", "harmless"):
        requests, texts = [], []
        for language, pairs in train.items():
            asked = pairs.harmful if (kind, side) == ("prompts, texts", "harmful") else pairs.harmless
            requests += asked
            texts += [REFUSAL[language] if side == "harmful" else own[request] for request in asked]
        canvas = dict(instructions=requests, responses=texts, ratio=ratio, seed=seed)
        means[side] = cached("masked", _mean_state, lm=lm, **canvas)["mean"][None]  # [1, l, d]
    facts = dict(model=lm.name, read_at="masked slots", contrast=kind, ratio=ratio, seed=seed, n=len(requests))
    return Candidates(means["harmful"], means["harmless"], positions=(None,), fingerprint=lm.fingerprint, provenance=facts)


def readings(lm: LanguageModel, direction: Direction, instructions: Sequence[str], batch_size: int = 32) -> list[float]:
    """Projection of each prompt on a single direction, where that was read: at its template position, prompt alone, or (position
    None) over the slots of an empty response."""
    n_slots = CANVAS if direction.position is None else 0
    site, found = Site(direction.layer), {}
    for rows in batches(lm, instructions, batch_size):
        ids, attention_mask = encode(lm, [instructions[i] for i in rows], n_slots)
        h = capture(lm, ids, [site], attention_mask)[site].float()
        if direction.position is None:
            h = h[:, -CANVAS:].mean(1)
        else:
            first = (attention_mask == 0).sum(1) if direction.position >= 0 else h.shape[1]
            h = h[torch.arange(len(h), device=h.device), first + direction.position]
        found |= zip(rows, (h @ direction.basis[0].to(h.device)).tolist(), strict=True)
    return [found[i] for i in range(len(instructions))]


def _mean_state(lm: LanguageModel, **canvas) -> dict[str, Tensor]:
    """Mean [l, d] (float64) of `slot_states`: what two kinds of contrast share is kept once."""
    return dict(mean=slot_states(lm, **canvas).double().mean(0))


def _slots(lm: LanguageModel, response: str) -> list[int]:
    ids = lm.tokenizer(response, add_special_tokens=False).input_ids[:CANVAS]
    return ids + [lm.eos_id] * (CANVAS - len(ids))
