"""Training data: documents cut into rows, and pools of chat rows, all as token ids.

    documents  en, zh (public text), parallel (dictionary lines and translation pairs)
    chat       general_en, general_zh (instructions), howto_* (harmless requests of the safety corpora), written_* (the project's own
               harmless requests), loaded_* (general ones with a dangerous-looking word), frames_* (harmless requests in the
               sentence frames of harmful ones), twins_* (the innocent side of the contrast rows); and to be refused
               contrast_* (their harmful side), harmful_*

A harmful request is only ever paired with a refusal, and no test row of contrast.jsonl or of the corpora is trained on: test_*
holds the corpora's ordinary test rows, for measuring. Openers ("The bus was late again.") stand before harmful and harmless
requests alike, so that an opening tells nothing.
"""

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic
from .sources import HAN, Corpora, contrast_rows, dictionary, phrases, written_rows
from .vocabulary import added_tokens, recipes

LANGUAGES = ("en", "zh")
DOCUMENT, CHAT = 192, 128  # tokens of a row
PROMPT = 88  # longest instruction, in tokens; longer ones are left out
QUOTAS = dict(  # documents to take from sources that are long, dull or hard; all of the others
    sgd=4000, openstax=5000, abc_news=1500, movie_reviews=1500, brown=2000, gutenberg_classics=1000,
    shopping_reviews=9000, classical_modern=3500, zhwiki=14000,
)  # fmt: skip
TEST = "test_"  # pools that are only measured on begin with it
COPIES = 4  # versions of a row that is refused or has an opener
OPENED = 0.35  # share of them with an opener
IMPERATIVE = dict(
    en=re.compile(
        r"(write|create|describe|explain|list|name|suggest|design|compose|find|identify|build|plan|summarize|compare|make|"
        r"choose|come up with|think of|outline|discuss|draw|organize|prepare|invent|calculate|translate|rewrite)\b",
        re.IGNORECASE,
    ),
    zh=re.compile(
        "写|解释|列出|描述|创建|设计|找|提供|说明|比较|总结|编写|制作|计算|选择|制定|翻译|改写|创作|推荐|介绍|概述|命名|构造|想出"
    ),
)

Pair = tuple[str, str]  # request, response


@dataclass(frozen=True)
class Pool:
    """Chat rows of one kind: ids [n, CHAT] padded with the end of turn; lengths [n] of prompt and of prompt + response."""

    ids: Tensor
    prompt: Tensor
    total: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, rows: list[tuple[list[int], list[int]]], end: int) -> "Pool":
        """From (prompt ids, response ids); `end` closes a response and pads."""
        ids = torch.full((len(rows), CHAT), end, dtype=torch.int32)
        for row, (prompt, response) in zip(ids, rows, strict=True):
            row[: len(prompt) + len(response)] = torch.tensor(prompt + response, dtype=torch.int32)
        lengths = [(len(prompt), len(prompt) + len(response)) for prompt, response in rows]
        prompt, total = torch.tensor(lengths, dtype=torch.uint8).reshape(-1, 2).unbind(1)
        return cls(ids.to(torch.uint16), prompt.contiguous(), total.contiguous())


@dataclass(frozen=True)
class Dataset:
    """documents: name -> ids [n, DOCUMENT]; chat: name -> Pool; recipes: see vocabulary. Ids are uint16."""

    documents: dict[str, Tensor]
    chat: dict[str, Pool]
    recipes: list[tuple[list[int], list[list[int]]]]

    def save(self, path: Path) -> None:
        tensors = {f"documents.{name}": rows for name, rows in self.documents.items()}
        for name, pool in self.chat.items():
            tensors |= {f"chat.{name}.{field}": getattr(pool, field) for field in ("ids", "prompt", "total")}
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"recipes": json.dumps(self.recipes)})

    @classmethod
    def load(cls, path: Path) -> "Dataset":
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            notes = json.loads(file.metadata()["recipes"])
        documents = {name.split(".")[1]: rows for name, rows in tensors.items() if name.startswith("documents.")}
        pools = sorted({name.split(".")[1] for name in tensors if name.startswith("chat.")})
        chat = {name: Pool(*(tensors[f"chat.{name}.{field}"] for field in ("ids", "prompt", "total"))) for name in pools}
        return cls(documents, chat, notes)


def assemble(corpora: Corpora, tokenizer, base_tokenizer, seed: int = 0) -> Dataset:
    """Everything that training reads, from the user's corpora and the project's rows; minutes on one core."""
    words = dictionary()
    rng = random.Random(seed)
    documents = {language: _chosen(corpora.rows(f"pretrain_{language}"), rng) for language in LANGUAGES}
    documents["parallel"] = _parallel(corpora, words, rng)
    chat = {name: pool for name, pairs in chat_pairs(corpora, rng).items() if len(pool := encode(pairs, tokenizer))}
    for language in LANGUAGES:
        test = [row for row in corpora.rows(f"sft_{language}") if row["split"] == "test"]
        chat[f"{TEST}{language}"] = encode([(row["prompt"], row["response"]) for row in test], tokenizer)
    new = added_tokens(tokenizer, len(base_tokenizer) + 1)
    return Dataset(
        {name: _cut(texts, tokenizer) for name, texts in documents.items()}, chat, recipes(new, words, base_tokenizer)
    )


def chat_pairs(corpora: Corpora, rng: random.Random) -> dict[str, list[Pair]]:
    """Pools of (request, response) in text, named <kind>_<language>, shuffled."""
    said, pools = phrases(), {}
    safety = [row for row in corpora.rows("safety") if row["split"] == "train"]
    for language in LANGUAGES:
        general = [(row["prompt"], row["response"]) for row in corpora.rows(f"sft_{language}") if row["split"] == "train"]
        harmless = [row for row in safety if row["label"] == "harmless" and row[language] and row[f"response_{language}"]]
        contrast = contrast_rows()
        kinds = {
            "general": general,
            "howto": [(row[language], row[f"response_{language}"]) for row in harmless],
            "written": [(row[f"{language}_prompt"], row[f"{language}_answer"]) for row in written_rows()],
            "loaded": _loaded(general, said["loaded"][language], language),
            "frames": _framed(general, said["frames"][language], language, rng),
            "twins": [(row[f"{language}_harmless"], row[f"{language}_answer"]) for row in contrast],
        }
        to_refuse = {
            "contrast": [row[f"{language}_harmful"] for row in contrast if row[f"{language}_harmful"]],
            "harmful": [row[language] for row in safety if row["label"] == "harmful" and row[language]],
        }
        openers, lengths = said["openers"][language], [len(answer) for _, answer in kinds["twins"]]
        for kind in ("howto", "written", "twins"):
            kinds[kind] = [(_opened(prompt, openers, rng), answer) for prompt, answer in kinds[kind] for _ in range(COPIES)]
        for kind, prompts in to_refuse.items():
            kinds[kind] = [
                (_opened(p, openers, rng), _refusal(said, language, rng.choice(lengths), rng))
                for p in prompts
                for _ in range(COPIES)
            ]
        for kind, pairs in kinds.items():
            rng.shuffle(pairs)
            pools[f"{kind}_{language}"] = pairs
    return pools


def encode(pairs: Iterable[Pair], tokenizer) -> Pool:
    """Rendered rows of at most CHAT tokens; a longer response is cut at its last sentence end that fits, or left out."""
    around = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False, add_generation_prompt=True)
    pre, post = (_ids([part], tokenizer)[0] for part in around.split("\0"))
    requests, responses = zip(*pairs, strict=True) if (pairs := list(pairs)) else ((), ())
    rows = []
    for request, response in zip(_ids(requests, tokenizer), _ids(responses, tokenizer), strict=True):
        if 0 < len(request) <= PROMPT:
            prompt = [*pre, *request, *post]
            response = fitted(response, CHAT - len(prompt) - 1, tokenizer)
            if response:
                rows.append((prompt, response))
    return Pool.of(rows, tokenizer.eos_token_id)


def fitted(response: list[int], room: int, tokenizer) -> list[int]:
    """The response, cut behind its last sentence end within `room` tokens if it is longer; empty if there is none."""
    if len(response) <= room:
        return response
    for end in range(room, 4, -1):
        if tokenizer.decode([response[end - 1]]).rstrip(" ").endswith((".", "!", "?", "。", "！", "？")):
            return response[:end]
    return []


def _chosen(rows: list[dict], rng: random.Random) -> list[str]:
    """Texts, at most QUOTAS of a source, shuffled."""
    by_source: dict[str, list[str]] = {}
    for row in rows:
        by_source.setdefault(row["source"], []).append(row["text"])
    texts = []
    for source, of_source in by_source.items():
        rng.shuffle(of_source)
        texts += of_source[: QUOTAS.get(source)]
    rng.shuffle(texts)
    return texts


def _parallel(corpora: Corpora, words: dict[str, list[str]], rng: random.Random) -> list[str]:
    """Documents of dictionary lines (one pass) and of translation pairs (three passes, in changing forms)."""
    entries = [(word, glosses[:4]) for word, glosses in words.items() if len(word) <= 5]
    rng.shuffle(entries)
    lines = []
    for word, glosses in entries:
        joined = "; ".join(glosses)
        lines.append(rng.choice([f"{word}: {joined}", f"{joined}: {word}", f'"{word}" means "{glosses[0]}".']))
    documents = ["\n".join(lines[at : at + 14]) for at in range(0, len(lines), 14)]
    pairs = [(row["en"], row["zh"]) for row in corpora.rows("safety") if row["split"] == "train" and row["en"] and row["zh"]]
    sides = [(row[f"en_{side}"], row[f"zh_{side}"]) for row in contrast_rows() for side in ("harmful", "harmless")]
    pairs += [pair for pair in sides if all(pair)]
    pairs += [pair for row in written_rows() for pair in ((row[f"en_{k}"], row[f"zh_{k}"]) for k in ("prompt", "answer"))]
    for language in LANGUAGES:
        for row in corpora.rows(f"sft_{language}"):
            _, colon, sentence = row["prompt"].replace("：", ":").partition(":")
            if row["split"] == "train" and row["source"].startswith("Tatoeba") and colon:
                sides = (sentence.strip(), row["response"])
                pairs.append(sides[::-1] if HAN.search(sides[0]) else sides)
    for _ in range(3):
        rng.shuffle(pairs)
        lines = [rng.choice([f"{en}\n{zh}", f"{zh}\n{en}", f"{en} ({zh})"]) for en, zh in pairs]
        documents += ["\n\n".join(lines[at : at + 3]) for at in range(0, len(lines), 3)]
    rng.shuffle(documents)
    return documents


def _framed(pairs: list[Pair], frames: list[str], language: str, rng: random.Random) -> list[Pair]:
    """Short harmless instructions that begin with a verb, put into sentence frames of harmful requests."""
    longest = 110 if language == "en" else 40
    framed = []
    for request, response in pairs:
        one_sentence = "\n" not in request and len(request) < longest and request.count(".") <= 1
        if one_sentence and IMPERATIVE[language].match(request) and bool(HAN.search(request)) == (language == "zh"):
            inner = (request[0].lower() + request[1:]).rstrip(".。！! ")
            framed.append((rng.choice(frames).format(inner), response))
    return framed


def _loaded(pairs: list[Pair], words: list[str], language: str) -> list[Pair]:
    """Pairs whose request has a dangerous-looking word."""
    joined = "|".join(words)
    pattern = re.compile(rf"\b({joined})\b" if language == "en" else joined, re.IGNORECASE)
    return [(request, response) for request, response in pairs if pattern.search(request)]


def _refusal(said: dict, language: str, length: int, rng: random.Random) -> str:
    """A refusal of about `length` characters: an opening, then reasons and offers.

    As long as answers to innocent requests are: a masked model sees how many slots there are, and would take a short canvas for
    a reason to refuse.
    """
    sentences = [rng.choice(said["refusals"][language])]
    for sentence in rng.sample(said["reasons"][language], len(said["reasons"][language])):
        if sum(map(len, sentences)) + len(sentence) / 2 > length:
            break
        sentences.append(sentence)
    return (" " if language == "en" else "").join(sentences)


def _opened(request: str, openers: list[str], rng: random.Random) -> str:
    return rng.choice(openers) + request if rng.random() < OPENED else request


def _ids(texts: Iterable[str], tokenizer) -> list[list[int]]:
    texts = list(texts)
    return tokenizer(texts, add_special_tokens=False).input_ids if texts else []


def _cut(texts: list[str], tokenizer) -> Tensor:
    """Texts one behind the other, each after a start token, cut into rows of DOCUMENT tokens."""
    flat = [i for ids in _ids(texts, tokenizer) for i in (tokenizer.bos_token_id, *ids)]
    rows = len(flat) // DOCUMENT
    return torch.tensor(flat[: rows * DOCUMENT], dtype=torch.int32).reshape(rows, DOCUMENT).to(torch.uint16)
