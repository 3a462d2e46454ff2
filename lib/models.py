"""Which checkpoint is this and how do I run it: loading, and logits that score their own position.

Every family (families.py) runs on a stock transformers class; code from a checkpoint is never executed. The shift of Dream-like
models lives here and nowhere else: `logits[:, i]` and `hidden[:, i]` belong to position i in every family.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from . import shipped
from .checkpoints import fingerprint_of, folder_of, read_json, shards_of, tensors_of
from .families import CheckpointError, Family, family_of


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A loaded checkpoint: the transformers model and what one must know to use it.

    `model` is an ordinary Llama or Qwen2 module in eval mode without gradients; `fingerprint` identifies its weights.
    """

    name: str
    family: Family
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    fingerprint: str
    mask_id: int | None
    eos_id: int
    pad_id: int
    eot_id: int | None = None

    @property
    def n_layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def d_model(self) -> int:
        return self.model.config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.model.model.embed_tokens.weight.device

    @property
    def causal(self) -> bool:
        return self.family.causal

    def trunk(self, ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Final normed hidden states [b, s, d], not aligned: with a causal model the state at i predicts i + 1.

        `attention_mask` is [b, s] (with `cache`: [b, past + s]), 1 for tokens and 0 for left padding.
        """
        positions = None
        if attention_mask is not None and self.family.positions == "unpadded":
            positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)[:, -ids.shape[1] :]
        out = self.model.model(
            ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return out.last_hidden_state

    def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states [b, s, d] such that `head(hidden[:, i])` scores position i."""
        return self.align(self.trunk(ids, attention_mask))

    def align(self, x: Tensor) -> Tensor:
        """Move raw outputs [b, s, ...] to the positions they score; the first is repeated, as Dream's sampler does."""
        shift = self.family.shift
        return torch.cat([x[:, :shift], x[:, : x.shape[1] - shift]], dim=1) if shift else x

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden states [..., d]."""
        return self.model.lm_head(hidden.contiguous())  # a slice would be multiplied as a batch, several times slower

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [b, s, vocab] of token ids [b, s]; `logits[:, i]` scores position i in every family."""
        return self.head(self.hidden(ids, attention_mask))

    def save(self, directory: str | Path) -> None:
        """Write an ordinary checkpoint directory (weights, config, tokenizer) that `load` and transformers read."""
        self.model.save_pretrained(directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)


def load(name: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LanguageModel:
    """Load a shipped model (smol-mdlm, smol-ar, smol-base), a local checkpoint directory, or a Hugging Face id.

    Only safetensors and JSON are read, and no code of a checkpoint is run. `device` defaults to CUDA when there is one; `dtype`
    to float32 on the CPU and to the checkpoint's own dtype elsewhere. A directory needs no tokenizer (`tokenizer` is then None).

    Raises CheckpointError for an unknown name, a hub id that cannot be fetched, or tensors missing, left over, of another
    shape or not finite; ShippedModelError when the files of a shipped model are damaged, WheelError when their base cannot be fetched.
    """
    name = str(name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name in shipped.names():
        config = shipped.config(name)
        tensors, fingerprint, tokenizer = (
            shipped.tensors(name).items(),
            shipped.fingerprint(name),
            shipped.tokenizer(name),
        )
        family = family_of(config)
    else:
        folder = folder_of(name)
        config = read_json(folder / "config.json")
        family = family_of(config)
        shards = shards_of(folder)
        tensors, fingerprint, tokenizer = tensors_of(shards), fingerprint_of(config, shards), _tokenizer(folder, family)
    if dtype is None:
        stored = config.get("dtype") or config.get("torch_dtype") or "float32"
        dtype = torch.float32 if device.type == "cpu" else getattr(torch, stored)
    model = _build(family, config, tensors, device, dtype)
    if tokenizer is not None and tokenizer.chat_template is None and "base" not in Path(name).name.lower():
        tokenizer.chat_template = family.template  # a base model completes text: its prompts have no template
    eos = config.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) else eos
    pad = config.get("pad_token_id")
    return LanguageModel(
        name=Path(name).name if Path(name).is_dir() else name,
        family=family,
        model=model,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        mask_id=None if family.causal else model.config.mask_token_id,
        eos_id=eos,
        pad_id=eos if pad is None else pad,
        eot_id=family.eot_id,
    )


def _build(
    family: Family, config: dict, tensors: Iterable[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """The transformers model with the checkpoint's tensors assigned one by one: never two copies of the weights in memory."""
    config_class = {LlamaForCausalLM: LlamaConfig, Qwen2ForCausalLM: Qwen2Config}[family.architecture]
    native = config_class(**family.native_config(config), dtype=dtype, attn_implementation=_attention(family))
    tensors = iter(tensors)
    with torch.device("meta"):
        model = family.architecture(native)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    if native.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    problems = {"unexpected": [], "of another shape": [], "not finite": []}
    seen = set()
    for key, tensor in tensors:
        target = _rename(key, family)
        if target == "lm_head.weight" and native.tie_word_embeddings:
            continue  # some exporters store the tied head a second time
        if target not in expected:
            problems["unexpected"].append(key)
        elif tensor.shape != expected[target] and not _resized(target, tensor, expected[target]):
            problems["of another shape"].append(f"{key} {tuple(tensor.shape)} instead of {tuple(expected[target])}")
        else:
            seen.add(target)
            tensor = tensor.to(device, dtype)
            if not torch.isfinite(tensor).all():
                problems["not finite"].append(key)
            model.load_state_dict({target: tensor}, strict=False, assign=True)
    problems["missing"] = sorted(expected.keys() - seen)
    if found := [
        f"{len(keys)} {kind}: {', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''}" for kind, keys in problems.items() if keys
    ]:
        raise CheckpointError(f"the tensors do not fit a {family.name} model of this config.json: " + "; ".join(found))
    model.config.vocab_size = model.model.embed_tokens.weight.shape[0]
    model.tie_weights()
    rotary = Float32Rotary if family.float32_rotary else type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(native).to(device)  # its buffers are in no checkpoint and were made on the meta device
    if not family.causal:
        model.config.is_causal = False
        model.config.mask_token_id = config.get("mask_token_id", family.mask_id)
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
    return model.eval().requires_grad_(False)


def _rename(key: str, family: Family) -> str:
    for pattern, replacement in family.rename:
        if re.match(pattern, key):
            return re.sub(pattern, replacement, key)
    return key


def _resized(key: str, tensor: Tensor, expected: torch.Size) -> bool:
    """MMaDA's embedding and head have more rows than its config.json says (image codes)."""
    return key in ("model.embed_tokens.weight", "lm_head.weight") and tensor.shape[1:] == expected[1:]


class Float32Rotary(LlamaRotaryEmbedding):
    """Rotary tables in float32 whatever the model's dtype, as LLaDA's own code makes them."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x[..., :1].float(), position_ids)  # x only tells the dtype and the device


def _rotated_in_float32(module, query, key, value, *args, **kwargs):
    """SDPA for queries and keys that float32 tables promoted: back to the values' dtype after the rotation."""
    return sdpa_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, *args, **kwargs)


AttentionInterface.register("sdpa_float32_rotary", _rotated_in_float32)
AttentionMaskInterface.register("sdpa_float32_rotary", sdpa_mask)


def _attention(family: Family) -> str:
    return "sdpa_float32_rotary" if family.float32_rotary else "sdpa"


def _tokenizer(folder: Path, family: Family):
    if not any((folder / file).exists() for file in ("tokenizer.json", "vocab.json")):
        return None
    return family.tokenizer.from_pretrained(folder)
