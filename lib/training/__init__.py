"""Where the shipped models come from: `python -m lib train smol-ar`, then `python -m lib train smol-mdlm`.

    sources      the public corpora, CC-CEDICT and the project's own rows; data/training/README.md has their licences
    vocabulary   the Chinese tokens, and embedding rows to start them from
    data         documents and pools of chat rows as token ids
    network      the base with low-rank factors merged in the forward pass; base and parent stay frozen
    answers      the base's own answers to English prompts: fluent targets of its own size
    objectives   next-token and masked-diffusion losses
    loop         batches, optimiser, checkpoints
    packing      factors <-> int8 adapter (data/models/README.md)
    measuring    held-out loss, refusal, repetition, before and after

Plain torch, on purpose: the loop fits on a page, and accelerate or a trainer would hide the two things that matter here, a
resume that is exact to the bit and losses that weight each masked slot. peft was left out for the same reason: it computes
x A' B' beside x W, which costs extra kernels for 210 matrices, while W + s B A is formed once a micro-batch here, and
its adapters would have to be converted to the shipped int8 format. The block is our own because transformers' Llama cannot
take its weights as arguments, which is what lets one compiled block serve all layers; a test holds it against
LlamaForCausalLM. safetensors stores checkpoints (nothing is unpickled), tqdm shows progress, lib.models loads the result.
"""
