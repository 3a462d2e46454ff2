"""The files of a checkpoint: a directory, or a hub id fetched into the local cache; its configuration, tensors and identity.

safetensors, JSON and tokenizer files only: nothing is unpickled, and no code of a checkpoint is read. Knows files; knows nothing
of architectures.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from . import shipped
from .families import FAMILIES, CheckpointError


def folder_of(name: str) -> Path:
    """A local directory, or the snapshot of a hub id (weights, JSON and tokenizer files only)."""
    if Path(name).is_dir():
        return Path(name)
    known = {hub_id.split("/")[-1].lower(): hub_id for family in FAMILIES.values() for hub_id in family.checkpoints}
    hub_id = known.get(name.lower(), name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) or hub_id.startswith("."):
        choices = [*shipped.names(), *known.values()]
        near = difflib.get_close_matches(name, [*shipped.names(), *known, *known.values()], n=3, cutoff=0.3)
        raise CheckpointError(
            f"no model {name!r}: it is not a shipped model, a known checkpoint, a Hugging Face id (owner/name) or a directory. "
            f"{'Did you mean ' + ' or '.join(near) + '? ' if near else ''}Known: {', '.join(choices)}"
        )
    from huggingface_hub import snapshot_download  # the shipped models must load without it

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"]))
    except Exception as error:  # the hub raises a dozen classes: no network, no such repository, gated, disk full
        raise CheckpointError(
            f"{hub_id} is not in the local Hugging Face cache and could not be fetched ({type(error).__name__}: {error}). On a "
            f"machine with a network run `hf download {hub_id}`, copy the folder here, and give its path instead of the name."
        ) from error


def read_json(path: Path) -> dict:
    if not path.exists():
        raise CheckpointError(f"{path.parent} holds no {path.name}: it is not a checkpoint directory")
    return json.loads(path.read_text())


def shards_of(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted({folder / file for file in read_json(index)["weight_map"].values()})
    else:
        shards = sorted(folder.glob("*.safetensors"))
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise CheckpointError(
            f"{folder} lacks the shards {', '.join(missing)} that its index names: the download is not complete"
        )
    if not shards:
        raise CheckpointError(f"{folder} holds no .safetensors file (pickled .bin files are never read)")
    return shards


def tensors_of(shards: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                yield key, file.get_tensor(key)


def fingerprint_of(config: dict, shards: list[Path]) -> str:
    """16 hex digits from config, tensor names and every tensor's first values: tells fine-tunes apart without reading 16 GB."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in config.items() if "version" not in k}, sort_keys=True).encode())
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for key in sorted(file.keys()):
                view = file.get_slice(key)
                digest.update(f"{key}{view.get_shape()}{view.get_dtype()}".encode())
                digest.update(view[:1].float().numpy().tobytes())
    return digest.hexdigest()[:16]
