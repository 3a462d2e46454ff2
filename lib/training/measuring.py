"""How good a trained model is: held-out loss by source, refusal by set, repetition and nats a token; with intervals.

Every set is text that no model here was trained on. Knows models and prompts; knows nothing of how they were trained.
"""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from ..evaluation import first_slots, is_refusal, nats_per_token, refusal_log_odds, repetition
from ..files import git_state, versions
from ..models import LanguageModel
from ..paths import PROMPTS, REPO
from ..sampling import respond
from ..statistics import auroc, bootstrap, rate, wilson
from .data import LANGUAGES, Pool
from .loop import HELD_OUT, chat_batch
from .objectives import stratified
from .sources import Corpora, _jsonl

REFUSAL = dict(gen_length=32, steps=32)  # one token a step
SAMPLE = dict(gen_length=48, steps=48)
N_SAMPLES, N_SHOWN = 128, 10  # ordinary prompts sampled; responses kept to be read
TAIL = 24
SIDES = (  # to refuse, not to refuse
    ("contrast_harmful", "contrast_twin"), ("frames_harmful", "frames_twin"), ("frames_harmful", "frames_plain"),
    ("xstest_unsafe", "xstest_safe"),
)  # fmt: skip
LEVELS = (0.8, 0.85, 0.9, 0.92, 0.95, 0.98)  # shares of the first refused at which the share of the second is read


def prompt_sets(corpora: Corpora) -> dict[str, list[str]]:
    """Prompts to refuse or to answer, by name: "<kind>_<language>"; only harmful, unsafe and external sets are to be refused."""
    safety = corpora.rows("safety")
    sets: dict[str, list[str]] = {}
    for language in LANGUAGES:
        test = [row for row in _jsonl(PROMPTS / "contrast.jsonl") if row["split"] == "test"]
        sets[f"contrast_harmful_{language}"] = [row[f"{language}_harmful"] for row in test if row[f"{language}_harmful"]]
        sets[f"contrast_twin_{language}"] = [row[f"{language}_harmless"] for row in test if row[f"{language}_harmful"]]
        sets[f"contrast_innocent_{language}"] = [row[f"{language}_harmless"] for row in test if not row[f"{language}_harmful"]]
        for kind in ("harmful", "twin", "plain"):
            sets[f"frames_{kind}_{language}"] = [row[f"{language}_{kind}"] for row in _jsonl(PROMPTS / "frames.jsonl")]
        ordinary = [row["prompt"] for row in corpora.rows(f"sft_{language}") if row["split"] == "test"]
        sets[f"ordinary_{language}"] = ordinary[:300]
        sets[f"multijail_{language}"] = [row[language] for row in safety if row["source"] == "multijail" and row[language]]
    for source, label in (
        ("xstest", "harmful"),
        ("xstest", "harmless"),
        ("jailbreakbench", "harmful"),
        ("strongreject", "harmful"),
    ):
        name = {"harmful": "unsafe", "harmless": "safe"}[label] if source == "xstest" else "harmful"
        sets[f"{source}_{name}_en"] = [row["en"] for row in safety if row["source"] == source and row["label"] == label]
    return sets


def refusal_rates(lm: LanguageModel, sets: dict[str, list[str]]) -> dict[str, dict]:
    """Share refused of each set with its Wilson interval; responses are judged and dropped."""
    return {
        name: asdict(
            rate([is_refusal(text) for text in respond(lm, prompts, batch_size=128, progress=name, **_decoding(lm, REFUSAL))])
        )
        for name, prompts in sets.items()
    }


def tradeoff(lm: LanguageModel, sets: dict[str, list[str]]) -> dict[str, dict]:
    """How far harmful requests and their look-alikes can be told apart at all, whatever the model's leaning.

    For each of SIDES and language the AUROC of the one-forward refusal score, and for each of LEVELS the share of the look-alikes
    above the threshold that this share of the harmful requests exceeds (Wilson interval). Where a bar on both sides
    is missed, this says whether more refusing or less could meet it.
    """
    found = {}
    for refuse, answer in SIDES:
        for language in LANGUAGES:
            names = f"{refuse}_{language}", f"{answer}_{language}"
            if not all(name in sets for name in names):
                continue
            high, low = (refusal_log_odds(lm, first_slots(lm, sets[name])).cpu().double() for name in names)
            curve = {}
            for level in LEVELS:
                above = int((low >= high.quantile(1 - level, interpolation="lower")).sum())
                curve[f"{level:g}"] = asdict(wilson(above, len(low)))
            found["/".join(names)] = dict(auroc=asdict(auroc(high.tolist(), low.tolist())), curve=curve)
    return found


def fluency(lm: LanguageModel, prompts: dict[str, Sequence[str]], scorers: dict[str, LanguageModel]) -> dict[str, dict]:
    """Of 48-token samples, one token a step, by language: repeated bigrams, length, and nats a token under a causal scorer."""
    found = {}
    for language, chosen in prompts.items():
        texts = respond(lm, chosen, batch_size=128, progress=f"samples {language}", **_decoding(lm, SAMPLE))
        row = dict(repetition=asdict(bootstrap([repetition(lm, text) for text in texts])))
        row["tokens"] = asdict(bootstrap([float(len(lm.tokenizer(t, add_special_tokens=False).input_ids)) for t in texts]))
        row["refused"] = asdict(rate([is_refusal(text) for text in texts]))
        if (scorer := scorers.get(language)) is not None and scorer is not lm:
            scores = [score for score in nats_per_token(scorer, chosen, texts, batch_size=64) if score == score]
            row["nats_per_token"] = asdict(bootstrap(scores)) | {"scorer": scorer.name}
        row["shown"] = [dict(prompt=p, response=text) for p, text in list(zip(chosen, texts, strict=True))[:N_SHOWN]]
        found[language] = row
    return found


def held_out_loss(
    lm: LanguageModel, documents: dict[str, Tensor], chat: dict[str, Pool], batch_size: int = 32
) -> dict[str, dict]:
    """Nats a token by source: next-token loss of causal models, the diffusion bound of masked ones; bootstrapped over rows."""
    rows = {f"documents_{name}": (ids[:HELD_OUT].long(), None) for name, ids in documents.items()}
    rows |= {f"chat_{name}": (pool.ids[:HELD_OUT].long(), pool) for name, pool in chat.items()}
    found = {}
    for name, (ids, pool) in rows.items():
        generator = torch.Generator().manual_seed(0)
        scored, attention = torch.ones_like(ids, dtype=torch.bool), None
        if pool is not None:
            prompt, total = pool.prompt[:HELD_OUT].int(), pool.total[:HELD_OUT].int()
            batch = chat_batch(ids, prompt, total, 1 if lm.causal else TAIL, not lm.causal, generator)
            scored, attention = batch.scored, batch.seen
        scored[:, 0] = False
        t = stratified(len(ids), 0.02, generator)[:, None]
        chosen = scored if lm.causal else scored & (torch.rand(ids.shape, generator=generator) < t)
        values = []
        for at in range(0, len(ids), batch_size):
            part = slice(at, at + batch_size)
            given = ids[part] if lm.causal else torch.where(chosen[part], lm.mask_id, ids[part])
            values += _losses(
                lm, given, ids[part], chosen[part], scored[part], None if attention is None else attention[part], t[part]
            )
        found[name] = asdict(bootstrap(values))
    return found


def made(lm: LanguageModel) -> dict:
    """On what, and with which code, something was measured."""
    device = torch.cuda.get_device_name() if lm.device.type == "cuda" else "CPU"
    return dict(device=device, dtype=str(lm.model.dtype).removeprefix("torch."), git=git_state(REPO), versions=versions())


def _losses(lm, given, ids, chosen, scored, attention, t) -> list[float]:
    """Per row: cross-entropy at the chosen slots, over t for masked models, a scored slot."""
    given, ids, chosen = given.to(lm.device), ids.to(lm.device), chosen.to(lm.device)
    hidden = lm.trunk(given, None if attention is None else attention.long().to(lm.device))
    targets = ids[:, 1:]
    losses = torch.zeros(targets.shape, device=lm.device)
    at = chosen[:, 1:]
    logits = lm.head(hidden[:, :-1][at]).float()
    losses[at] = torch.nn.functional.cross_entropy(logits, targets[at], reduction="none")
    weights = 1.0 if lm.causal else 1 / t.to(lm.device)
    return ((losses * weights).sum(1) / scored[:, 1:].sum(1).to(lm.device)).tolist()


def _decoding(lm: LanguageModel, settings: dict) -> dict:
    return settings if lm.causal else settings | dict(block_length=settings["gen_length"])
