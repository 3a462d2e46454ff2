"""Activation steering of masked diffusion language models. Names are imported on first use, so that `--help` stays quick."""

from importlib import import_module

_HOME = {
    "Contrast": "prompts", "Decoding": "sampling", "Direction": "extraction", "Scope": "steering", "Site": "hooking",
    "ablate": "steering", "activations": "extraction", "add": "steering", "cached": "results", "capture": "hooking",
    "clamp": "steering", "compare": "effects", "contrast": "prompts", "decode": "prompts", "encode": "prompts",
    "intervene": "hooking", "is_refusal": "evaluation", "load": "models", "mean_difference": "extraction", "pooled": "prompts",
    "position_names": "prompts", "respond": "sampling", "sample": "sampling", "select": "selection", "sweep": "results",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'lib' has no name {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
