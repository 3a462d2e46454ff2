"""How text is made: reverse diffusion by LLaDA's and Dream's rules, and plain autoregression for the control.

Masked slots are proposed in parallel, the most confident of them committed, and committed tokens are final. The two published
samplers differ in schedule, confidence and noise; each is a handful of lines here, over one loop:

    LLaDA  blocks; equal counts a step; Gumbel-max tokens; confidence = their un-noised probability, or random  (2502.09992)
    Dream  one block; counts from a linear time grid; filtered categorical tokens; p, margin, -entropy or random  (2508.15487)

`exact` mode is token-equal to the published code and draws the same random numbers in the same order. The fast mode draws for
the masked slots only, from a generator for each row: a row then does not depend on its batch, and steps without a commit cost
nothing. In both, the head runs on masked slots only, and nothing waits for the device inside a step.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from .models import LanguageModel
from .prompts import batches, decode, encode, regions
from .steering import Intervention, StepState, steering

LladaRemasking = Literal["low_confidence", "random"]
DreamRemasking = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]
Remasking = Literal[LladaRemasking, DreamRemasking, "autoregressive"]
DREAM = get_args(DreamRemasking)
_LLADA_ONLY = ("cfg_scale", "logits_eos_inf", "confidence_eos_eot_inf")
FOREIGN = (  # fields of Decoding that have no meaning with a remasking
    dict.fromkeys(get_args(LladaRemasking), ("top_p", "top_k", "alg_temp"))
    | dict.fromkeys(DREAM, _LLADA_ONLY)
    | {"autoregressive": (*_LLADA_ONLY, "alg_temp")}
)


class DecodingError(ValueError):
    """Decoding settings that contradict each other or do not fit the model."""


@dataclass(frozen=True)
class Decoding:
    """How a response is decoded. Names are those of the published samplers; `remasking` selects whose rules hold.

    gen_length: response slots. steps: forward passes over all blocks. block_length: slots of a block (LLaDA). temperature: 0 is
    greedy. cfg_scale: classifier-free guidance, 0 is off (LLaDA). logits_eos_inf: never write end-of-text; confidence_eos_eot_inf:
    write ends of text and turn last (LLaDA). top_p, top_k: keep the likeliest tokens; alg_temp: temperature of the order (Dream).
    """

    gen_length: int = 32
    steps: int = 32
    block_length: int = 32
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    cfg_scale: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float | None = None
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    exact: bool = True

    def __post_init__(self):
        if self.remasking not in (
            known := [name for group in (LladaRemasking, DreamRemasking) for name in get_args(group)] + ["autoregressive"]
        ):
            raise DecodingError(f"remasking {self.remasking!r}; use one of {', '.join(known)}")
        if min(self.gen_length, self.steps, self.block_length) < 1:
            raise DecodingError("gen_length, steps and block_length must be at least 1")
        if self.temperature < 0:
            raise DecodingError(f"temperature must not be negative, got {self.temperature}")
        if self.gen_length % self.block_length:
            raise DecodingError(f"gen_length {self.gen_length} is not a multiple of block_length {self.block_length}")
        if self.steps % self.n_blocks:
            raise DecodingError(f"steps {self.steps} do not divide into {self.n_blocks} blocks")
        if wrong := [name for name in FOREIGN[self.remasking] if getattr(self, name)]:
            raise DecodingError(f"{', '.join(wrong)} has no meaning with remasking={self.remasking!r}")
        if self.remasking in DREAM and self.n_blocks > 1:
            raise DecodingError(
                f"remasking={self.remasking!r} has no blocks: block_length must equal gen_length ({self.gen_length})"
            )

    @property
    def n_blocks(self) -> int:
        return self.gen_length // self.block_length

    @classmethod
    def of(cls, lm: LanguageModel, **changes) -> "Decoding":
        """The default of the model's family with `changes`; a new gen_length takes steps and block_length along, unless given.

        With another remasking, defaults that have no meaning there are left out.
        """
        if unknown := changes.keys() - {field.name for field in fields(cls)}:
            raise TypeError(f"unknown decoding fields {sorted(unknown)}; known: {[field.name for field in fields(cls)]}")
        remasking = changes.get("remasking", lm.family.decoding["remasking"])
        settings = {name: value for name, value in lm.family.decoding.items() if name not in FOREIGN.get(remasking, ())}
        if "gen_length" in changes:
            gen_length, block_length = changes["gen_length"], settings["block_length"]
            one_block = settings["block_length"] == settings["gen_length"] or gen_length % block_length
            settings |= dict(steps=gen_length, block_length=gen_length if one_block else block_length)
        return cls(**settings | changes)


@dataclass(frozen=True, eq=False)
class Trace:
    """What happened at each step t to the g response slots: ids [t, b, g] after it, confidence [t, b, g] of the proposals
    (NaN where a slot was not up for choice), committed [t, b, g] (bool)."""

    ids: Tensor
    confidence: Tensor
    committed: Tensor


@dataclass(frozen=True, eq=False)
class Sample:
    """ids: [b, prompt + gen]. n_forward: forward passes of the model (a guided pass of a doubled batch counts once)."""

    ids: Tensor
    prompt_length: int
    n_forward: int
    trace: Trace | None = None

    @property
    def response(self) -> Tensor:
        """Response ids [b, gen]."""
        return self.ids[:, self.prompt_length :]


def sample(
    lm: LanguageModel,
    prompt_ids: Tensor,
    attention_mask: Tensor | None = None,
    interventions: Sequence[Intervention] = (),
    seed: int | Sequence[int] = 0,
    decoding: Decoding | None = None,
    trace: bool = False,
    given: Sequence[int | None] = (),
    **changes,
) -> Sample:
    """Decode responses to left-padded prompts [b, s], steered by `interventions` at every step that their scopes allow.

    `decoding` defaults to the family's own; `changes` are fields of Decoding. `given`: tokens that stand in the first response
    slots from the start, None where a slot is open. In the fast mode row i draws from seed + i (or seed[i]).
    Raises DecodingError when the settings do not fit the model: a diffusion sampler needs a mask token, and only a masked
    model can fill gaps between given tokens.
    """
    decoding = Decoding.of(lm, **changes) if decoding is None else replace(decoding, **changes)
    _check_given(lm, given, decoding)
    if lm.causal != (decoding.remasking == "autoregressive"):
        kind = "autoregressive and has no mask token" if lm.causal else "a masked diffusion model"
        raise DecodingError(
            f"{lm.name} is {kind}: remasking={decoding.remasking!r} does not fit it. Leave `decoding` out to use the default "
            f"of its family, remasking={lm.family.decoding['remasking']!r}."
        )
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None  # no padding: attention without a mask is faster, and the same
    run = _autoregression if lm.causal else _reverse_diffusion
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        at = stack.enter_context(steering(lm, interventions))
        draws = _Draws(seed, len(prompt_ids), decoding.exact, lm.device)
        return run(lm, prompt_ids.to(lm.device), attention_mask, at, draws, decoding, trace, given)


def _check_given(lm: LanguageModel, given: Sequence[int | None], decoding: Decoding) -> None:
    if len(given) > decoding.gen_length or (len(given) == decoding.gen_length and None not in given):
        raise DecodingError(f"{len(given)} given slots leave nothing to write in gen_length {decoding.gen_length}")
    if lm.causal and None in given:
        raise DecodingError(f"{lm.name} writes from left to right: given tokens must come first, without gaps")


def respond(
    lm: LanguageModel,
    instructions: Sequence[str],
    interventions: Sequence[Intervention] = (),
    seed: int = 0,
    batch_size: int = 32,
    progress: str | None = None,
    **changes,
) -> list[str]:
    """Responses (text) to instructions, in their order; batches are of similar length, and `progress` names a progress bar.

    `changes` are fields of Decoding, or `given` (see `sample`); the fast mode is the default here, so that a response does not
    depend on its batch.
    """
    texts: dict[int, str] = {}
    with tqdm(total=len(instructions), desc=progress, disable=progress is None, mininterval=1, leave=False) as bar:
        for rows in batches(lm, instructions, batch_size):
            prompt_ids, attention_mask = encode(lm, [instructions[i] for i in rows])
            settings = {"exact": False} | changes  # `given` among them goes on to `sample`
            seeds = seed if settings["exact"] else [seed + i for i in rows]
            out = sample(lm, prompt_ids, attention_mask, interventions, seeds, **settings)
            texts |= zip(rows, decode(lm, out.response), strict=True)
            bar.update(len(rows))
    return [texts[i] for i in range(len(instructions))]


# --- schedules ----------------------------------------------------------------------------------------------------------------


def transfer_counts(n_masked: int, steps: int) -> list[int]:
    """LLaDA: how many tokens to commit at each step; sums to n_masked, earlier steps take the remainder."""
    base, extra = divmod(n_masked, steps)
    return [base + (i < extra) for i in range(steps)]


def time_grid(steps: int, eps: float = 1e-3) -> Tensor:
    """Dream: for each step the share of masked slots to unmask, 1 - s/t on a linear grid from 1 to eps; the last takes all."""
    t = torch.linspace(1, eps, steps + 1)
    return torch.cat([1 - t[1:-1] / t[:-2], torch.ones(1)])


def _plan(decoding: Decoding, n_open: Sequence[int]) -> list[tuple[int, int, int]]:
    """(block, masked slots of that block before the step, slots to commit) for each step; for `origin` the counts are random.

    n_open: masked slots of each block at the start.
    """
    if decoding.remasking not in DREAM:
        counts = [
            (b, c) for b in range(decoding.n_blocks) for c in transfer_counts(n_open[b], decoding.steps // decoding.n_blocks)
        ]
    elif decoding.remasking == "origin":
        return [(0, n_open[0], 0)] * decoding.steps
    else:
        counts, left = [], n_open[0]
        for share in time_grid(decoding.steps):  # float32 and floored, as in the published code
            counts.append((0, int(torch.tensor(float(left)) * share)))
            left -= counts[-1][1]
    plan, left = [], list(n_open)
    for block, count in counts:
        plan.append((block, left[block], count))
        left[block] -= count
    return plan


# --- masked diffusion ---------------------------------------------------------------------------------------------------------


def _reverse_diffusion(lm, prompt_ids, attention_mask, at, draws, decoding, trace, tokens_given) -> Sample:
    b, prompt_length = prompt_ids.shape
    canvas = [lm.mask_id if token is None else token for token in tokens_given]
    canvas = prompt_ids.new_tensor(canvas + [lm.mask_id] * (decoding.gen_length - len(canvas)))
    ids = torch.cat([prompt_ids, canvas.expand(b, -1)], dim=1)
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(b, decoding.gen_length)], dim=1)
    codes = regions(lm, ids, attention_mask, prompt_length)
    open_slots = torch.zeros_like(ids, dtype=torch.bool)
    open_slots[:, prompt_length:] = canvas == lm.mask_id  # still to be committed; a mask inside the prompt is left as it is
    n_open = (canvas == lm.mask_id).view(decoding.n_blocks, -1).sum(1).tolist()
    given = ids != lm.mask_id  # what guidance hides from the unconditional half
    random_order, n_forward, steps = decoding.remasking == "origin", 0, []
    for step, (block, n_left, count) in enumerate(_plan(decoding, n_open)):
        if not (decoding.exact or count or random_order):
            continue
        if not n_open[block]:
            continue  # it was given whole
        at(StepState(codes, ids == lm.mask_id, step, decoding.steps, block, decoding.n_blocks))
        first = prompt_length + block * decoding.block_length
        # The open slots of this block, in order; their number is known beforehand, so nothing waits for the device.
        in_block = open_slots[:, first : first + decoding.block_length].byte()
        slots = in_block.argsort(dim=1, descending=True, stable=True)[:, :n_left] + first
        logits = _logits_at(lm, ids, attention_mask, slots, given, decoding.cfg_scale)
        n_forward += 1
        if random_order:
            share = time_grid(decoding.steps)[step].item()
            tokens, confidence, among = _propose_origin(logits, open_slots.gather(1, slots), share, draws, decoding)
            chosen = torch.zeros_like(open_slots).scatter(1, slots, among)
        else:
            propose = _propose_dream if decoding.remasking in DREAM else _propose_llada
            tokens, confidence = propose(lm, logits, slots, ids.shape[1], draws, decoding)
            chosen = _choose(confidence, slots, ids.shape[1], count, draws, decoding)
        before = open_slots
        ids = torch.where(chosen, ids.scatter(1, slots, tokens), ids)
        open_slots = open_slots & ~chosen
        if trace:
            shown = torch.full(ids.shape, torch.nan, device=ids.device).scatter(1, slots, confidence.float())
            steps.append((ids, shown.masked_fill(~before, torch.nan), chosen))
    record = Trace(*(torch.stack(part)[..., prompt_length:] for part in zip(*steps, strict=True))) if trace else None
    return Sample(ids, prompt_length, n_forward, record)


def _logits_at(lm, ids, attention_mask, slots, given, cfg_scale) -> Tensor:
    """Logits [b, n, vocab] at slots [b, n], guided if asked; the mask token can never be chosen."""
    if cfg_scale:
        blank = torch.where(given, lm.mask_id, ids)
        mask = None if attention_mask is None else attention_mask.repeat(2, 1)
        both = lm.head(_at(lm.hidden(torch.cat([ids, blank]), mask), slots.repeat(2, 1)))
        conditional, unconditional = both.chunk(2)
        logits = unconditional + (cfg_scale + 1) * (conditional - unconditional)
    else:
        logits = lm.head(_at(lm.hidden(ids, attention_mask), slots))
    logits[..., lm.mask_id] = -torch.inf
    return logits


def _propose_llada(lm, logits, slots, length, draws, decoding) -> tuple[Tensor, Tensor]:
    if decoding.logits_eos_inf:
        logits[..., lm.eos_id] = -torch.inf
    noised = logits
    if decoding.temperature > 0:
        # argmax of exp(logits) / (-ln u)^T, taken in logarithms
        u = draws.uniform(slots, length, logits.shape[-1], torch.float64 if decoding.exact else torch.float32)
        noised = logits.to(u.dtype) - decoding.temperature * torch.log(-torch.log(u))
    tokens = noised.argmax(-1)
    if decoding.confidence_eos_eot_inf:
        # The published code bans both where T = 0; with noise its ban of end-of-text lands on a copy that is not read again.
        late = [lm.eot_id] if decoding.temperature > 0 else [lm.eos_id, lm.eot_id]
        logits[..., [token for token in late if token is not None]] = -torch.inf
    if decoding.remasking == "random":
        return tokens, draws.uniform(slots, length, None, torch.float32)
    return tokens, torch.take_along_dim(logits.softmax(-1), tokens[..., None], -1)[..., 0]


def _propose_dream(lm, logits, slots, length, draws, decoding) -> tuple[Tensor, Tensor]:
    probabilities = _filtered(logits, decoding).softmax(-1)
    tokens = draws.categorical(probabilities) if decoding.temperature > 0 else probabilities.argmax(-1)
    match decoding.remasking:
        case "maskgit_plus":
            return tokens, torch.take_along_dim(probabilities, tokens[..., None], -1)[..., 0]
        case "topk_margin":
            top = probabilities.topk(2).values
            return tokens, top[..., 0] - top[..., 1]
        case "entropy":
            return tokens, (probabilities * torch.log(probabilities + 1e-10)).sum(-1)


def _propose_origin(logits, is_open, share, draws, decoding) -> tuple[Tensor, Tensor, Tensor]:
    """Dream's ancestral step: each open slot is unmasked with probability `share`; also returns which ones, [b, n]."""
    probabilities = _filtered(logits, decoding).softmax(-1)
    chosen = is_open & (draws.uniform_where(is_open) < share)
    tokens = draws.categorical(probabilities, chosen) if decoding.temperature > 0 else probabilities.argmax(-1)
    return tokens, torch.take_along_dim(probabilities, tokens[..., None], -1)[..., 0], chosen


def _filtered(logits: Tensor, decoding: Decoding) -> Tensor:
    """Temperature, then nucleus, then top-k; what is cut gets the smallest finite number, as in the published code."""
    if decoding.temperature > 0:
        logits = logits / decoding.temperature
    smallest = torch.finfo(logits.dtype).min
    if decoding.top_p is not None and decoding.top_p < 1:
        ordered, order = logits.sort(descending=True)
        mass = ordered.softmax(-1).cumsum(-1)
        cut = torch.cat([torch.zeros_like(mass[..., :1], dtype=torch.bool), mass[..., :-1] > decoding.top_p], dim=-1)
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), smallest)
    if decoding.top_k is not None:
        kth = logits.topk(min(decoding.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, smallest)
    return logits


def _choose(confidence, slots, length, count, draws, decoding) -> Tensor:
    """Bool [b, length]: the `count` most confident slots of each row, or a draw in proportion (alg_temp)."""
    everywhere = confidence.new_full((len(slots), length), -torch.inf).scatter(1, slots, confidence)
    chosen = torch.zeros_like(everywhere, dtype=torch.bool)
    if count == 0:
        return chosen
    if decoding.alg_temp:
        picked = draws.without_replacement((everywhere / decoding.alg_temp).softmax(-1), count)
    else:
        picked = everywhere.topk(count).indices
    return chosen.scatter(1, picked, True)


def _at(x: Tensor, slots: Tensor) -> Tensor:
    """Rows of x [b, s, d] at slots [b, n]."""
    return torch.take_along_dim(x, slots[..., None], 1)


# --- the autoregressive control -----------------------------------------------------------------------------------------------


def _autoregression(lm, prompt_ids, attention_mask, at, draws, decoding, trace, tokens_given) -> Sample:
    """Left to right with a key-value cache, by the same scopes: a step is a token, and a cached position was steered when read."""
    b, prompt_length = prompt_ids.shape
    ids = torch.cat([prompt_ids, prompt_ids.new_full((b, decoding.gen_length), lm.pad_id)], dim=1)
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(b, decoding.gen_length)], dim=1)
    codes = regions(lm, ids, attention_mask, prompt_length)
    nothing_masked = torch.zeros_like(ids, dtype=torch.bool)
    ends = torch.tensor([token for token in (lm.eos_id, lm.eot_id) if token is not None], device=ids.device)
    finished = torch.zeros(b, dtype=torch.bool, device=ids.device)
    cache, read, n_forward, steps = DynamicCache(config=lm.model.config), 0, 0, []
    for step in range(decoding.gen_length):
        end = prompt_length + step
        at(StepState(codes[:, :end], nothing_masked[:, :end], step, decoding.gen_length, start=read))
        seen = None if attention_mask is None else attention_mask[:, :end]
        probabilities = _filtered(lm.head(lm.trunk(ids[:, read:end], seen, cache)[:, -1:]), decoding).softmax(-1)
        tokens = (draws.categorical(probabilities) if decoding.temperature > 0 else probabilities.argmax(-1))[:, 0]
        if step < len(tokens_given):
            tokens = torch.full_like(tokens, tokens_given[step])
        ids[:, end] = torch.where(finished, lm.pad_id, tokens)
        n_forward, read = n_forward + 1, end
        if trace:
            confidence = torch.full_like(ids, torch.nan, dtype=torch.float32)
            confidence[:, end] = torch.take_along_dim(probabilities[:, 0], tokens[:, None], -1)[:, 0].float()
            steps.append(
                (
                    ids.clone(),
                    confidence,
                    torch.zeros_like(nothing_masked).index_fill(1, torch.tensor(end, device=ids.device), True),
                )
            )
        finished = finished | torch.isin(tokens, ends)
        if finished.all():
            break
    record = Trace(*(torch.stack(part)[..., prompt_length:] for part in zip(*steps, strict=True))) if trace else None
    return Sample(ids, prompt_length, n_forward, record)


class _Draws:
    """Random numbers: one stream in the order of the published code (exact), or one stream for each row (fast)."""

    def __init__(self, seed: int | Sequence[int], rows: int, exact: bool, device: torch.device):
        if isinstance(seed, int):
            seeds = [seed] if exact else [seed + i for i in range(rows)]
        elif exact or len(seed) != rows:
            raise DecodingError("one seed for each row needs exact=False, and as many seeds as rows")
        else:
            seeds = list(seed)
        self.exact, self.device = exact, device
        self.generators = [torch.Generator(device).manual_seed(s) for s in seeds]

    def uniform(self, slots: Tensor, length: int, vocab: int | None, dtype: torch.dtype) -> Tensor:
        """[b, n] or [b, n, vocab]. The published code draws for every position of the sequence, then uses some."""
        tail = () if vocab is None else (vocab,)
        if self.exact:
            drawn = torch.rand(len(slots), length, *tail, generator=self.generators[0], dtype=dtype, device=self.device)
            return torch.take_along_dim(drawn, slots[..., None] if tail else slots, 1)
        return torch.stack(
            [torch.rand(slots.shape[1], *tail, generator=g, dtype=dtype, device=self.device) for g in self.generators]
        )

    def uniform_where(self, mask: Tensor) -> Tensor:
        """[b, n]; in exact mode drawn for the True entries only, in row order."""
        if self.exact:
            drawn = torch.zeros(mask.shape, device=self.device)
            drawn[mask] = torch.rand(int(mask.sum()), generator=self.generators[0], device=self.device)
            return drawn
        return torch.stack([torch.rand(mask.shape[1], generator=g, device=self.device) for g in self.generators])

    def categorical(self, probabilities: Tensor, where: Tensor | None = None) -> Tensor:
        """Token ids [b, n] from probabilities [b, n, vocab]; in exact mode drawn where `where` is True, the rest are 0."""
        if self.exact:
            where = torch.ones(probabilities.shape[:-1], dtype=torch.bool, device=self.device) if where is None else where
            chosen = probabilities[where]
            tokens = torch.zeros(where.shape, dtype=torch.long, device=self.device)
            if len(chosen):
                normalised = chosen / chosen.sum(-1, keepdim=True)  # as torch.distributions.Categorical does
                tokens[where] = torch.multinomial(normalised, 1, True, generator=self.generators[0])[:, 0]
            return tokens
        return torch.stack(
            [torch.multinomial(p, 1, True, generator=g)[:, 0] for p, g in zip(probabilities, self.generators, strict=True)]
        )

    def without_replacement(self, weights: Tensor, count: int) -> Tensor:
        """`count` distinct columns [b, count] of each row, in proportion to weights [b, n]."""
        if self.exact:
            return torch.multinomial(weights, count, generator=self.generators[0])
        return torch.stack([torch.multinomial(w, count, generator=g) for w, g in zip(weights, self.generators, strict=True)])
