"""The registry: everything that differs between model families, one entry each.

    LLaDA  LlamaForCausalLM after a key rename, bidirectional, rotary in float32, slot i scored at i   (arXiv 2502.09992)
    Dream  Qwen2ForCausalLM as it is, bidirectional, slot i scored at i - 1                            (arXiv 2508.15487)
    Llama  LlamaForCausalLM, causal: the autoregressive control
    Llama-MDLM  a Llama turned into a masked diffusion model the way Dream was made: the shipped smol-mdlm

Every family runs on a stock transformers class. Knows configurations and key names; knows nothing of tensors or files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

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
    checked: str = ""  # how far loading and sampling were verified


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
    checked="golden numbers of the published code on tiny weights: logits bit-equal, sampler token-equal",
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
    checked="golden numbers of the published code on tiny weights: logits bit-equal, sampler token-equal",
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
    checked="greedy tokens equal to transformers on tiny weights; the shipped smol-ar and smol-base",
)
LLAMA_MDLM = Family(
    name="llama-mdlm",
    architecture=LlamaForCausalLM,
    native_config=_stock_config,
    shift=1,
    template=_CHATML,
    # The last slots of a canvas are surely ends of text: the most confident ones, so a canvas would be filled from its end.
    decoding=dict(gen_length=32, steps=32, block_length=32, remasking="low_confidence", confidence_eos_eot_inf=True),
    checked="the shipped smol-mdlm; round trip through save and load, and through the layouts of LLaDA and Dream, bit-equal",
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
    lines = []
    for family in FAMILIES.values():
        own = [name for name in shipped.names() if family_of(shipped.config(name)) is family]
        lines += [f"{family.name} ({family.architecture.__name__}, {'causal' if family.causal else 'masked diffusion'})"]
        lines += [
            f"    checked   {family.checked}",
            f"    models    {', '.join([*own, *family.checkpoints]) or '-'}",
        ]
    return "\n".join(lines)
