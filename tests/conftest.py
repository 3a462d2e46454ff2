"""Tiny models with random weights, one of each family; no network and no shipped weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lib.models import load

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def llada():
    return replace(load(GOLDEN / "llada"), eot_id=505)


@pytest.fixture(scope="session")
def dream():
    return load(GOLDEN / "dream")


def tiny_llama(folder: Path, **extra) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return load(tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="session")
def llama_mdlm(tmp_path_factory):
    return load(tiny_llama(tmp_path_factory.mktemp("mdlm"), is_causal=False, mask_token_id=95))
