"""Trained factors <-> the int8 adapter that ships (data/models/README.md). Knows tensors and one file; nothing of training.

Each row of A and of the embedding, and each column of B, has a float16 scale: its largest absolute value over 127.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..shipped import GGUF_FILE, GGUF_SHA256


def pack(trained: dict[str, Tensor], path: Path, **metadata: object) -> None:
    """Write `trained` (see Network.trained) as an adapter file. `metadata` is kept as strings; scaling and rank belong in it."""
    tensors = {}
    for name, value in trained.items():
        tensors[name], tensors[f"{name}.scale"] = _int8(value, dim=0 if name.endswith(".lora_B") else 1)
    known = dict(base=GGUF_FILE, base_sha256=GGUF_SHA256, logit_shift=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={key: str(value) for key, value in (known | metadata).items()})


def unpack(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """float32 factors and embedding rows of an adapter of any rank, and its metadata."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if not name.endswith(".scale")]
        return {
            name: file.get_tensor(name).float() * file.get_tensor(f"{name}.scale").float() for name in names
        }, file.metadata()


def merge(weights: dict[str, Tensor], trained: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """`weights` with W + scaling * B A in the place of each matrix that has factors, float32; embedding rows are left alone."""
    merged = {name: value.float() for name, value in weights.items()}
    for name in [name.removesuffix(".lora_A") for name in trained if name.endswith(".lora_A")]:
        delta = scaling * trained[f"{name}.lora_B"].float() @ trained[f"{name}.lora_A"].float()
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + delta
    return merged


def _int8(value: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    scale = (value.detach().float().cpu().abs().amax(dim, keepdim=True) / 127).clamp(min=1e-7).half()
    return (value.detach().float().cpu() / scale.float()).round().clamp(-127, 127).to(
        torch.int8
    ).contiguous(), scale.contiguous()
