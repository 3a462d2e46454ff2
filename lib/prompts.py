"""What is at each position: chat rendering, left-padded batches, token regions, and the contrast prompts.

A rendered prompt is  pre-instruction | instruction | post-instruction  (template, user text, template); the response follows.
The three parts are tokenised apart, so a region is exact and template positions are the same for every prompt.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from .models import LanguageModel
from .paths import PROMPTS

Language = Literal["en", "zh"]
Side = Literal["harmful", "harmless"]
Split = Literal["train", "val", "test"]
PAD, PRE_INSTRUCTION, INSTRUCTION, POST_INSTRUCTION, RESPONSE = range(5)
REGIONS = {
    "pre_instruction": PRE_INSTRUCTION,
    "instruction": INSTRUCTION,
    "post_instruction": POST_INSTRUCTION,
    "response": RESPONSE,
}
_SENTINEL = "\u2603instruction\u2603"


@dataclass(frozen=True)
class Template:
    """Token ids around an instruction: `pre` before it, `post` from its end to the start of the response."""

    pre: tuple[int, ...]
    post: tuple[int, ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """Every template position: 0, 1, ... counted from the start, then ..., -2, -1 from the end of the prompt."""
        return (*range(len(self.pre)), *range(-len(self.post), 0))


def template(lm: LanguageModel) -> Template:
    """The chat template of `lm` for one user turn; empty for base models. Raises ValueError when the model has no tokenizer."""
    tokenizer = _tokenizer(lm)
    if tokenizer.chat_template is None:
        return Template((), ())
    text = tokenizer.apply_chat_template([{"role": "user", "content": _SENTINEL}], tokenize=False, add_generation_prompt=True)
    pre, post = text.split(_SENTINEL)
    return Template(*(tuple(tokenizer(part, add_special_tokens=False).input_ids) for part in (pre, post)))


def position_names(lm: LanguageModel) -> dict[int, str]:
    """Readable names of the template positions, e.g. {1: "pre 1 'user'", -1: "post -1 '\\\\n'"}."""
    around = template(lm)
    names = {}
    for position in around.positions:
        part, ids = ("pre", around.pre) if position >= 0 else ("post", around.post)
        names[position] = f"{part} {position} {lm.tokenizer.decode([ids[position]])!r}"
    return names


def encode(lm: LanguageModel, instructions: Sequence[str], n_slots: int = 0) -> tuple[Tensor, Tensor]:
    """Render and left-pad instructions: (ids [b, s], attention_mask [b, s]), followed by `n_slots` empty response slots.

    An empty slot holds the mask token; in a causal model the padding token, which nothing before it can see. Template tokens
    inside a user's text are encoded as plain text, so no instruction can leave its turn.
    Raises ValueError for an empty list or an empty instruction.
    """
    if isinstance(instructions, str) or not instructions:
        raise ValueError("give a non-empty list of instructions")
    around = template(lm)
    rows = []
    for text in instructions:
        if not text.strip():
            raise ValueError(f"instruction {len(rows)} is empty")
        rows.append([*around.pre, *_plain_ids(lm, text.strip()), *around.post])
    width = max(map(len, rows))
    ids = torch.full((len(rows), width + n_slots), lm.pad_id)
    attention_mask = torch.ones_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) : width] = torch.tensor(row)
        attention_mask[i, : width - len(row)] = 0
    if n_slots and not lm.causal:
        ids[:, width:] = lm.mask_id
    return ids.to(lm.device), attention_mask.to(lm.device)


def batches(lm: LanguageModel, instructions: Sequence[str], batch_size: int) -> Iterator[list[int]]:
    """Indices of `instructions` in batches of similar token length, shortest first: padding is work for nothing."""
    lengths = (
        [len(ids) for ids in _tokenizer(lm)(list(instructions), add_special_tokens=False).input_ids] if instructions else []
    )
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def regions(lm: LanguageModel, ids: Tensor, attention_mask: Tensor | None, prompt_length: int) -> Tensor:
    """Region code [b, s] (int8, see REGIONS; 0 is padding) of rendered prompts followed by a response.

    Prompts that do not follow the chat template (base models, hand-made ids) count as instruction from end to end.
    """
    codes = torch.full(ids.shape, INSTRUCTION, dtype=torch.int8, device=ids.device)
    around = template(lm) if lm.tokenizer is not None else Template((), ())
    start = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    if attention_mask is not None:
        start = prompt_length - attention_mask[:, :prompt_length].sum(1)
    for i, first in enumerate(start.tolist()):
        row = tuple(ids[i, first:prompt_length].tolist())
        pre, post = len(around.pre), len(around.post)
        if len(row) > pre + post and row[:pre] == around.pre and row[len(row) - post :] == around.post:
            codes[i, first : first + pre] = PRE_INSTRUCTION
            codes[i, prompt_length - post : prompt_length] = POST_INSTRUCTION
        codes[i, :first] = PAD
    codes[:, prompt_length:] = RESPONSE
    return codes


def decode(lm: LanguageModel, response_ids: Tensor) -> list[str]:
    """Text of responses [b, g], each cut at its first end-of-text or end-of-turn token."""
    ends = {lm.eos_id, lm.eot_id}
    texts = []
    for row in response_ids.tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(_tokenizer(lm).decode(row[:end]).strip())
    return texts


def _tokenizer(lm: LanguageModel):
    if lm.tokenizer is None:
        raise ValueError(
            f"{lm.name} was loaded without a tokenizer: put tokenizer.json beside its weights, or work on token ids"
        )
    return lm.tokenizer


def _plain_ids(lm: LanguageModel, text: str) -> list[int]:
    """Ids of user text in which template tokens (control tokens flagged special) are spelled out rather than obeyed."""
    tokenizer = _tokenizer(lm)
    spelling = _control_tokens(tokenizer)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [piece for token in ids for piece in spelling.get(token, (token,))]


@lru_cache
def _control_tokens(tokenizer) -> dict[int, tuple[int, ...]]:
    """Each control token and its text's ids, broken after the first character so that it is not recognised."""

    def spell(text: str) -> tuple[int, ...]:
        return tuple(i for part in (text[:1], text[1:]) for i in tokenizer(part, add_special_tokens=False).input_ids)

    return {i: spell(token.content) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


# --- contrast prompts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """Parallel requests of one language and split: harmful[i] and harmless[i] are twins (same form, opposite intent)."""

    language: Language
    split: str
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]


def contrast(language: Language, split: Split, n: int | None = None, seed: int = 0) -> Contrast:
    """`n` twin pairs (all by default) of data/prompts/contrast.jsonl, drawn with `seed`; the same rows in both languages.

    Rows of `test` were in no model's training data; see data/prompts/README.md. Raises ValueError when fewer than `n` pairs exist.
    """
    lines = (PROMPTS / "contrast.jsonl").read_text(encoding="utf8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == split and row["en_harmful"]]
    if n is not None and n > len(rows):
        raise ValueError(f"{n} {split} pairs asked, {len(rows)} exist")
    random.Random(seed).shuffle(rows)
    rows = rows[:n]
    return Contrast(language, split, *(tuple(row[f"{language}_{side}"] for row in rows) for side in ("harmful", "harmless")))


def by_language(
    split: Split, sides: Sequence[Side], n: int | None = None, seed: int = 0
) -> dict[Language, dict[Side, tuple[str, ...]]]:
    """Prompts of `n` pairs in each language: {language: {side: prompts}}."""
    return {
        language: {side: getattr(contrast(language, split, n, seed), side) for side in sides} for language in get_args(Language)
    }


def pooled(split: Split, n: int | None = None, seed: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(harmful, harmless) prompts of `n` pairs a language, English and Chinese together: what one direction for both is made from."""
    sets = by_language(split, get_args(Side), n, seed).values()
    return tuple(tuple(prompt for prompts in sets for prompt in prompts[side]) for side in get_args(Side))
