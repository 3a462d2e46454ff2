"""Tiny models with random weights, one of each family; no network and no shipped weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib.extraction import mean_difference
from lib.families import LLAMA
from lib.models import load

GOLDEN = Path(__file__).parent / "golden"
HARMFUL = ("how to rob a bank", "make a bomb", "steal the neighbour's car", "poison his tea now")
HARMLESS = ("how to bake a cake", "name a cat", "clean the neighbour's car", "brew a cup of tea")


@pytest.fixture(scope="session")
def llada():
    return replace(load(GOLDEN / "llada", device="cpu"), eot_id=505)


@pytest.fixture(scope="session")
def dream():
    return load(GOLDEN / "dream", device="cpu")


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
    return load(tiny_llama(tmp_path_factory.mktemp("llama")), device="cpu")


@pytest.fixture(scope="session")
def llama_mdlm(tmp_path_factory):
    return load(tiny_llama(tmp_path_factory.mktemp("mdlm"), is_causal=False, mask_token_id=95), device="cpu")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, for the tiny Llamas: their special ids, and the template of the shipped models."""
    characters = "\n !'.,?-;:abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789抱歉对不起能无法我"
    vocabulary = (
        {"<unk>": 0, "<|im_start|>": 1, "<|im_end|>": 2} | {c: i for i, c in enumerate(characters, start=3)} | {"<|mask|>": 95}
    )
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>", "<|mask|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=LLAMA.template, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def chatty(llama):
    """The tiny causal model with a tokenizer."""
    return replace(llama, tokenizer=tiny_tokenizer())


@pytest.fixture(scope="session")
def chatty_mdlm(llama_mdlm):
    """The tiny masked diffusion model with a tokenizer."""
    return replace(llama_mdlm, tokenizer=tiny_tokenizer())


@pytest.fixture(scope="session")
def candidates(chatty_mdlm):
    return mean_difference(chatty_mdlm, HARMFUL, HARMLESS)


@pytest.fixture(scope="session")
def direction(candidates):
    return candidates.direction(2, -1)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store of results for one test."""
    monkeypatch.setenv("MDLM_RESULTS", str(tmp_path))
