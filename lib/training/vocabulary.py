"""The Chinese tokens: which they are, and embedding rows to start them from.

data/models/tokenizer is the fixed result, and training uses it as it is; `chinese_tokens` is how its added tokens were chosen
and finds the same ones from the same corpora. An embedding row starts as 0.6 x the mean of the token's byte pieces + 0.4 x the
mean of its English glosses in CC-CEDICT, at the length this gives (rescaled to the usual length, logits explode); the mask
token's as the mean of all rows. Other ways to start from a dictionary: WECHSEL (arXiv 2112.06598), FOCUS (arXiv 2305.14481).
"""

import re
from collections import Counter

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .sources import Corpora

PUNCTUATION = list("，。、；：？！“”‘’（）《》…—")
SIZE = 8191  # tokens besides the mask token: 49,152 + 1 + 8,191 = 57,344
CHARACTERS, RAREST = 3600, 8  # at most so many characters, each seen at least so often
GLOSSES = 4


def chinese_tokens(corpora: Corpora, words: dict[str, list[str]]) -> list[str]:
    """Punctuation, then characters, then words of `words` (2 to 4 characters), each by frequency: SIZE tokens.

    Words are found by longest match from the left. Chat rows count twice and harmful or harmless training prompts 20 times,
    so that the words that a refusal turns on are tokens.
    """
    texts = [(row["text"], 1) for row in corpora.rows("pretrain_zh")]
    texts += [(row["prompt"] + row["response"], 2) for row in corpora.rows("sft_zh")]
    texts += [(row["zh"], 20) for row in corpora.rows("safety") if row["zh"] and row["split"] == "train"]
    known = {word for word in words if re.fullmatch("[\u4e00-\u9fff]{2,4}", word)}
    characters, found = Counter(), Counter()
    for text, weight in texts:
        for run in re.findall("[\u4e00-\u9fff]+", text):
            for character in run:
                characters[character] += weight
            at = 0
            while at < len(run):
                length = next((n for n in (4, 3, 2) if run[at : at + n] in known and at + n <= len(run)), 1)
                if length > 1:
                    found[run[at : at + length]] += weight
                at += length
    single = [character for character, count in characters.most_common(CHARACTERS) if count >= RAREST]
    chosen = PUNCTUATION + single
    return chosen + [word for word, _ in found.most_common(SIZE - len(chosen))]


def added_tokens(tokenizer: PreTrainedTokenizerFast, first: int) -> list[str]:
    """The tokenizer's added tokens from id `first` on, in order of their ids."""
    return [token.content for i, token in sorted(tokenizer.added_tokens_decoder.items()) if i >= first]


def recipes(
    tokens: list[str], words: dict[str, list[str]], base_tokenizer: PreTrainedTokenizerFast
) -> list[tuple[list[int], list[list[int]]]]:
    """For each token the base's ids of its pieces, and of each of its first GLOSSES glosses."""

    def ids(text: str) -> list[int]:
        return base_tokenizer(text, add_special_tokens=False).input_ids

    return [(ids(token), [ids(f" {gloss}") for gloss in words.get(token, [])[:GLOSSES]]) for token in tokens]


def initial_rows(embedding: Tensor, recipes: list[tuple[list[int], list[list[int]]]]) -> Tensor:
    """Embedding rows [1 + len(recipes), d], float32: the mask token's, then one a recipe."""
    embedding = embedding.float()
    rows = [embedding.mean(0)]
    for pieces, glosses in recipes:
        row = embedding[pieces].mean(0)
        if glosses:
            row = 0.6 * row + 0.4 * torch.stack([embedding[gloss].mean(0) for gloss in glosses]).mean(0)
        rows.append(row)
    return torch.stack(rows)
