"""`python -m lib train NAME`: from corpora to an int8 adapter and its measurements, below one folder.

    <out>/data.safetensors      what was assembled: token ids (made once; needs the corpora)
    <out>/prompts.json          the prompts that measuring uses
    <out>/answers.safetensors   the base's own answers (made once)
    <out>/<name>/               checkpoint, log.jsonl, then adapter.safetensors, config.json and measured.json

A parent trained into the same folder is preferred to the one that ships. To install a model, copy its adapter.safetensors and
config.json into data/models/<name>.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import shipped
from ..files import atomic, sha256
from ..models import LanguageModel, load
from ..paths import MODELS, REPO
from ..studies import UserError
from . import measuring
from .answers import own_answers
from .config import ConfigError, TrainConfig
from .data import TEST, Dataset, assemble
from .loop import Trainer, run
from .network import EMBEDDING, NEW_ROWS, Network, Shape
from .packing import merge, pack, unpack
from .sources import Corpora
from .vocabulary import initial_rows

OUT = REPO / "runs" / "training"
BASE = "smol-base"
ADAPTER = "adapter.safetensors"


def train(name: str, corpora: Path | None = None, out: Path = OUT, resume: bool = False) -> Path:
    """Train `name` as its train.toml says, pack it, and return the folder with its adapter and config.json."""
    try:
        config = TrainConfig.of(name)
        folder, checkpoint = out / name, out / name / "checkpoint.safetensors"
        if checkpoint.exists() and not resume:
            raise UserError(f"{checkpoint} holds an earlier run: --resume goes on from it; delete it to train anew")
        dataset = prepared(out, corpora)
        if config.answers:
            dataset.chat["answers_en"] = _answers(out, dataset, config.answers)
        folder.mkdir(parents=True, exist_ok=True)
        trainer = trainer_of(name, config, dataset, out)
        if resume and checkpoint.exists():
            trainer.restore(checkpoint)
        run(trainer, checkpoint, folder / "log.jsonl", name)
    except ConfigError as error:
        raise UserError(str(error)) from error
    finish(name, config, trainer.network, out)
    return folder


def prepared(out: Path, corpora: Path | None = None) -> Dataset:
    """The assembled data and the prompts to measure on, made from the corpora unless `out` holds them already."""
    path = out / "data.safetensors"
    if not path.exists():
        found = Corpora.find(corpora)
        print(f"assembling the training data from {found.folder} into {path} (some minutes, once)")
        with atomic(out / "prompts.json") as temporary:
            temporary.write_text(json.dumps(measuring.prompt_sets(found), ensure_ascii=False), encoding="utf8")
        assemble(found, shipped.tokenizer("smol-mdlm"), shipped.tokenizer(BASE)).save(path)
    return Dataset.load(path)


def trainer_of(name: str, config: TrainConfig, dataset: Dataset, out: Path) -> Trainer:
    """A run at its first step, on the GPU (bfloat16, compiled) if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    frozen, rows = parent_of(config.parent, out)
    if rows is None:
        rows = initial_rows(frozen[EMBEDDING], dataset.recipes)
    network = Network(
        frozen,
        rows,
        Shape.of(shipped.config(name)),
        config.rank,
        config.scaling,
        causal=config.objective == "causal",
        generator=torch.Generator().manual_seed(config.seed),
        dtype=torch.bfloat16 if gpu else torch.float32,
        compiled=gpu,
    )
    mask_id = len(frozen[EMBEDDING])  # the first row behind the base's
    return Trainer(config, network.to(device), dataset, mask_id, device)


def parent_of(name: str, out: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    """Float32 weights of a model with the base's embedding rows alone, and the rows behind them (None for the base)."""
    if name == BASE:
        return shipped.tensors(BASE), None
    factors, notes = unpack(_adapter(name, out))
    weights, _ = parent_of(notes.get("parent", BASE), out)
    return merge(weights, factors, float(notes["scaling"])), factors[NEW_ROWS]


def finish(name: str, config: TrainConfig, network: Network, out: Path) -> None:
    """Pack the factors and write the config.json that goes with them."""
    path = out / name / ADAPTER
    first = len(network.embedding)
    parent = {} if config.parent == BASE else dict(parent=config.parent, parent_sha256=sha256(_adapter(config.parent, out)))
    notes = dict(rank=config.rank, scaling=config.scaling, causal=str(network.causal).lower(), mask_token_id=first, **parent)
    pack(network.trained(), path, first_new_row=first, vocab_size=first + len(network.new_rows), **notes)
    settings = shipped.config(name) | {"adapter_sha256": sha256(path)}
    (path.parent / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def measure(name: str, corpora: Path | None = None, out: Path = OUT) -> Path:
    """Measure the model trained into `out`, or else the shipped one; returns the JSON file with rates and intervals.

    Samples to read by eye go into samples.json beside it. Copied into data/models/<name>, the measurements become part of the
    card with `python -m lib card <name>`; samples hold prompts of the corpora and stay outside the repository.
    """
    dataset = prepared(out, corpora)
    sets = json.loads((out / "prompts.json").read_text(encoding="utf8"))
    ordinary = {language: sets[f"ordinary_{language}"][: measuring.N_SAMPLES] for language in ("en", "zh")}
    base = load(BASE)
    path = (out if (out / name / ADAPTER).exists() else out / "shipped") / name / "measured.json"
    if name == BASE:
        lm, found = base, dict(fluency=measuring.fluency(base, {"en": ordinary["en"]}, {}))
    else:
        lm = trained_or_shipped(name, out)
        scorers = {"en": base} | ({} if lm.causal else {"zh": trained_or_shipped("smol-ar", out)})
        held_out = {pool: rows for pool, rows in dataset.chat.items() if pool.startswith(TEST)}
        found = dict(
            refusal=measuring.refusal_rates(lm, sets),
            tradeoff=measuring.tradeoff(lm, sets),
            fluency=measuring.fluency(lm, ordinary, scorers),
            held_out=measuring.held_out_loss(lm, dataset.documents, held_out),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = {language: row.pop("shown") for language, row in found["fluency"].items()}
    made = measuring.made(lm) | dict(fingerprint=_fingerprint(name, out))
    for file, content in (
        (path, dict(model=name, causal=lm.causal, **found, made=made)),
        (path.with_name("samples.json"), samples),
    ):
        file.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf8")
    return path


def _fingerprint(name: str, out: Path) -> str:
    trained = out / name / ADAPTER
    return sha256(trained)[:16] if trained.exists() else shipped.fingerprint(name)


def trained_or_shipped(name: str, out: Path) -> LanguageModel:
    """The model in `out`, as an ordinary checkpoint that lib.models.load reads, or the shipped one."""
    if not (out / name / ADAPTER).exists():
        return load(name)
    weights, rows = parent_of(name, out)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, name)
        shutil.copytree(MODELS / "tokenizer", folder)
        shutil.copy(out / name / "config.json", folder)
        save_file(weights | {EMBEDDING: torch.cat([weights[EMBEDDING], rows])}, folder / "model.safetensors")
        return load(folder)


def _adapter(name: str, out: Path) -> Path:
    trained = out / name / ADAPTER
    return trained if trained.exists() else MODELS / name / ADAPTER


def _answers(out: Path, dataset: Dataset, count: int):
    path = out / "answers.safetensors"
    if not path.exists():
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        pool = own_answers(load(BASE, dtype=dtype), dataset.chat["general_en"], count)
        Dataset({}, {"answers_en": pool}, []).save(path)
    return Dataset.load(path).chat["answers_en"]
