"""Which checkpoint is this and how do I run it: families, loading, and logits that score their own position.

Every family runs on a stock transformers class; code from a checkpoint is never executed. What differs between families is
one `Family` entry each: the class, key renames, attention, the logit shift, special ids, the template and the default decoding.

    LLaDA  LlamaForCausalLM after a key rename, bidirectional, rotary in float32, slot i scored at i   (arXiv 2502.09992)
    Dream  Qwen2ForCausalLM as it is, bidirectional, slot i scored at i - 1                            (arXiv 2508.15487)
    Llama  LlamaForCausalLM, causal: the autoregressive control
    Llama-MDLM  a Llama turned into a masked diffusion model the way Dream was made: the shipped smol-mdlm

The shift lives here and nowhere else: `logits[:, i]` and `hidden[:, i]` belong to position i in every family.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
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
    Qwen2Tokenizer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from . import shipped


class CheckpointError(RuntimeError):
    """A checkpoint cannot be found or does not hold what its family needs; the message names what and where."""


@dataclass(frozen=True)
class Family:
    """One row of the registry: everything that differs between model families."""

    name: str
    architecture: type[PreTrainedModel]
    native_config: Callable[[dict], dict]  # checkpoint's config.json -> fields of the transformers config
    causal: bool = False
    shift: int = 0  # logits at position i - shift score position i
    positions: Literal["absolute", "unpadded"] = "unpadded"  # whether left padding takes up rotary positions
    float32_rotary: bool = False
    rename: tuple[tuple[str, str], ...] = ()  # regular expressions, checkpoint key -> transformers key
    mask_id: int | None = None  # used where config.json names none
    eot_id: int | None = None  # end of turn, where it differs from the end of text
    tokenizer: type = PreTrainedTokenizerFast
    template: str | None = None  # chat template (Jinja) for tokenizers that come without one
    decoding: Mapping[str, object] = field(default_factory=dict)  # default fields of sampling.Decoding
    checkpoints: tuple[str, ...] = ()  # hub ids of this layout


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
        with torch.no_grad():
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
        with torch.no_grad():
            return self.model.lm_head(hidden.contiguous())  # a slice would be multiplied as a batch, several times slower

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [b, s, vocab] of token ids [b, s]; `logits[:, i]` scores position i in every family."""
        return self.head(self.hidden(ids, attention_mask))

    def save(self, directory: str | Path) -> None:
        """Write an ordinary checkpoint directory (weights, config, tokenizer) that `load` and transformers read."""
        self.model.save_pretrained(directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)


# --- the registry -------------------------------------------------------------------------------------------------------------


def _llada_config(config: dict) -> dict:
    for flag in (
        "include_bias",
        "include_qkv_bias",
        "bias_for_layer_norm",
        "attention_layer_norm",
        "scale_logits",
        "alibi",
    ):
        if config.get(flag):
            raise CheckpointError(
                f"this LLaDA checkpoint sets {flag}, which no released one does; the Llama class cannot express it"
            )
    return dict(
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        max_position_embeddings=config["max_sequence_length"],
        rms_norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        tie_word_embeddings=config.get("weight_tying", False),
        **_common(config),
    )


def _stock_config(config: dict) -> dict:
    """Llama and Qwen2 field names, as they are; fields of remote code and of saving are left out."""
    drop = {
        "architectures",
        "auto_map",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "mask_token_id",
        "is_causal",
        "adapter_sha256",
    }
    fields = {key: value for key, value in config.items() if key not in drop | _common(config).keys()}
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta", 10000.0)} | (fields.pop("rope_scaling", None) or {})
    return {"rope_parameters": rope} | fields | _common(config)


def _common(config: dict) -> dict:
    return {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLADA_RENAME = tuple(
    (rf"^model\.transformer\.blocks\.(\d+)\.{old}\.weight$", rf"model.layers.\1.{new}.weight")
    for old, new in {
        "attn_norm": "input_layernorm",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "attn_out": "self_attn.o_proj",
        "ff_norm": "post_attention_layernorm",
        "ff_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "ff_out": "mlp.down_proj",
    }.items()
) + (
    (r"^model\.transformer\.wte\.weight$", "model.embed_tokens.weight"),
    (r"^model\.transformer\.ln_f\.weight$", "model.norm.weight"),
    (r"^model\.transformer\.ff_out\.weight$", "lm_head.weight"),
)

LLADA = Family(
    name="llada",
    architecture=LlamaForCausalLM,
    native_config=_llada_config,
    positions="absolute",
    float32_rotary=True,
    rename=_LLADA_RENAME,
    mask_id=126336,
    eot_id=126348,
    template=(
        "{% for message in messages %}{% if loop.first %}<|startoftext|>{% endif %}<|start_header_id|>{{ message['role'] }}"
        "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    decoding=dict(gen_length=128, steps=128, block_length=32, remasking="low_confidence"),
    checkpoints=(
        "GSAI-ML/LLaDA-8B-Instruct",
        "GSAI-ML/LLaDA-8B-Base",
        "GSAI-ML/LLaDA-1.5",
        "Gen-Verse/MMaDA-8B-MixCoT",
    ),
)
DREAM = Family(
    name="dream",
    architecture=Qwen2ForCausalLM,
    native_config=_stock_config,
    shift=1,
    mask_id=151666,
    tokenizer=Qwen2Tokenizer,
    template=_CHATML,
    decoding=dict(gen_length=128, steps=128, block_length=128, remasking="entropy"),
    checkpoints=(
        "Dream-org/Dream-v0-Instruct-7B",
        "Dream-org/Dream-v0-Base-7B",
        "Dream-org/Dream-Coder-v0-Instruct-7B",
    ),
)
LLAMA = Family(
    name="llama",
    architecture=LlamaForCausalLM,
    native_config=_stock_config,
    causal=True,
    shift=1,
    template=_CHATML,
    decoding=dict(gen_length=32, steps=32, block_length=32, remasking="autoregressive"),
    checkpoints=("HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
)
LLAMA_MDLM = Family(
    name="llama-mdlm",
    architecture=LlamaForCausalLM,
    native_config=_stock_config,
    shift=1,
    template=_CHATML,
    decoding=dict(gen_length=32, steps=32, block_length=32, remasking="low_confidence"),
)
FAMILIES = {family.name: family for family in (LLADA, DREAM, LLAMA, LLAMA_MDLM)}


def family_of(config: dict) -> Family:
    """The family of a checkpoint's config.json. Raises CheckpointError for a model type that is not in the registry."""
    kind = config.get("model_type")
    if kind in ("llada", "mmada"):
        return LLADA
    if kind == "Dream":
        return DREAM
    if kind == "llama":
        return LLAMA if config.get("is_causal", True) else LLAMA_MDLM
    raise CheckpointError(f"model_type {kind!r} is of no known family; known: llada, mmada, Dream, llama")


def describe() -> str:
    """What can be loaded, and how far each family was checked: the table of `python -m lib models`."""
    checked = {
        "llada": "golden numbers of the published code on tiny weights: logits bit-equal, sampler token-equal",
        "dream": "golden numbers of the published code on tiny weights: logits bit-equal, sampler token-equal",
        "llama": "the shipped smol-ar and smol-base",
        "llama-mdlm": "the shipped smol-mdlm; round trip through save and load bit-equal",
    }
    lines = []
    for family in FAMILIES.values():
        own = [name for name in shipped.names() if family_of(shipped.config(name)) is family]
        lines += [f"{family.name} ({family.architecture.__name__}, {'causal' if family.causal else 'masked diffusion'})"]
        lines += [
            f"    checked   {checked[family.name]}",
            f"    models    {', '.join([*own, *family.checkpoints]) or '-'}",
        ]
    return "\n".join(lines)


# --- loading ------------------------------------------------------------------------------------------------------------------


def load(name: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LanguageModel:
    """Load a shipped model (smol-mdlm, smol-ar, smol-base), a local checkpoint directory, or a Hugging Face id.

    Only safetensors and JSON are read, and no code of a checkpoint is run. `device` defaults to CUDA when there is one; `dtype`
    to float32 on the CPU and to the checkpoint's own dtype elsewhere. A directory needs no tokenizer (`tokenizer` is then None).

    Raises CheckpointError for an unknown name, a hub id that cannot be fetched, or tensors missing, left over, of another
    shape or not finite; ShippedModelError when the files of a shipped model are damaged or the base cannot be fetched.
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
        folder = _folder(name)
        config = _read_json(folder / "config.json")
        family = family_of(config)
        shards = _shards(folder)
        tensors, fingerprint, tokenizer = _read(shards), _fingerprint(config, shards), _tokenizer(folder, family)
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


def _folder(name: str) -> Path:
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


def _read_json(path: Path) -> dict:
    if not path.exists():
        raise CheckpointError(f"{path.parent} holds no {path.name}: it is not a checkpoint directory")
    return json.loads(path.read_text())


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted({folder / file for file in _read_json(index)["weight_map"].values()})
    else:
        shards = sorted(folder.glob("*.safetensors"))
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise CheckpointError(
            f"{folder} lacks the shards {', '.join(missing)} that its index names: the download is not complete"
        )
    if not shards:
        raise CheckpointError(f"{folder} holds no .safetensors file (pickled .bin files are never read)")
    return shards


def _read(shards: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                yield key, file.get_tensor(key)


def _fingerprint(config: dict, shards: list[Path]) -> str:
    """16 hex digits from config, tensor names and every tensor's first values: tells fine-tunes apart without reading 16 GB."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in config.items() if "version" not in k}, sort_keys=True).encode())
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for key in sorted(file.keys()):
                view = file.get_slice(key)
                digest.update(f"{key}{view.get_shape()}{view.get_dtype()}".encode())
                digest.update(view[:1].float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _tokenizer(folder: Path, family: Family):
    if not any((folder / file).exists() for file in ("tokenizer.json", "vocab.json")):
        return None
    return family.tokenizer.from_pretrained(folder)
