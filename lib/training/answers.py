"""Answers of the base itself to English prompts: targets that a model of its size can fit, and that read fluently.

The instruction corpora answer in a larger writer's words, which a 135M model copies badly (it repeats itself). The base's own
greedy answers cost it least; sequence-level distillation (arXiv 1606.07947) with the teacher as its own student.
"""

import torch
from tqdm.auto import tqdm

from ..evaluation import is_refusal
from ..models import LanguageModel
from ..sampling import sample
from .data import CHAT, Pool, fitted

LENGTH = 80  # tokens sampled; an unfinished answer is cut at its last sentence end
REPETITION = 0.15  # share of repeated bigrams from which an answer is dropped


def own_answers(base: LanguageModel, pool: Pool, count: int, batch_size: int = 1024) -> Pool:
    """The first `count` prompts of `pool` that the base has tokens for, with its greedy answers; bad answers are left out.

    Bad: unfinished without a sentence end, repetitive, or a refusal (a refusal is learnt from harmful requests alone).
    """
    n_tokens, ends = base.model.config.vocab_size, base.eos_id
    prompts = [row[:length].tolist() for row, length in zip(pool.ids.int(), pool.prompt.tolist(), strict=True)]
    prompts = [prompt for prompt in prompts if max(prompt) < n_tokens][:count]
    prompts.sort(key=len)
    rows = []
    for at in tqdm(range(0, len(prompts), batch_size), desc="answers of the base", mininterval=5):
        batch = prompts[at : at + batch_size]
        width = max(map(len, batch))
        ids = torch.full((len(batch), width), base.pad_id)
        for row, prompt in zip(ids, batch, strict=True):
            row[width - len(prompt) :] = torch.tensor(prompt)
        attention_mask = torch.arange(width) >= width - torch.tensor([len(prompt) for prompt in batch])[:, None]
        out = sample(base, ids, attention_mask.long().to(base.device), gen_length=LENGTH, steps=LENGTH)
        for prompt, response in zip(batch, out.response.tolist(), strict=True):
            finished = ends in response
            room = min(CHAT - len(prompt) - 1, len(response) if finished else len(response) - 1)
            response = fitted(response[: response.index(ends)] if finished else response, room, base.tokenizer)
            if response and _repeated(response) < REPETITION and not is_refusal(base.tokenizer.decode(response)):
                rows.append((prompt, response))
    return Pool.of(rows, ends)


def _repeated(ids: list[int]) -> float:
    bigrams = list(zip(ids, ids[1:], strict=False))
    return 1 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0
