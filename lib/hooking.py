"""Read and change activations. Knows sites and hooks; knows nothing of directions, scopes or samplers.

Sites carry TransformerLens' names. In block l of a pre-norm transformer:

    resid_pre --(+ attn_out)--> resid_mid --(+ mlp_out)--> resid_post = resid_pre of block l + 1

Hooks are data given to one context manager. They return new tensors (in-place edits would also change what other hooks have
recorded), and they are removed whatever happens inside. `output_hidden_states` is never used: it reports unsteered states.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .models import LanguageModel

SiteName = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
SITES: tuple[str, ...] = get_args(SiteName)
Edit = Callable[[Tensor], Tensor]  # [b, s, d] -> [b, s, d]; returns its argument itself to leave it as it is


@dataclass(frozen=True, order=True)
class Site:
    """A place in the residual stream: block `layer` (from 0) and one of SITES."""

    layer: int
    name: SiteName = "resid_pre"

    def __post_init__(self):
        if self.name not in SITES:
            raise ValueError(f"site {self.name!r}; use one of {', '.join(SITES)}")


@contextmanager
def intervene(lm: LanguageModel, edits: Sequence[tuple[Site, Edit]]) -> Iterator[None]:
    """Apply `edits` to every forward pass inside the block; edits of one site run in the order given.

    An edit of resid_mid changes both what the MLP reads and what the residual stream carries on.
    Raises ValueError for a layer that the model does not have.
    """
    with ExitStack() as stack:
        for site, edit in edits:
            for handle in _attach(lm, site, edit):
                stack.callback(handle.remove)
        yield


def capture(lm: LanguageModel, ids: Tensor, sites: Sequence[Site], attention_mask: Tensor | None = None) -> dict[Site, Tensor]:
    """Activations {site: [b, s, d]} of one forward pass in the model's dtype; inside `intervene`, the edited ones.

    The pass stops after the last site asked for, and the head is not run.
    """
    states: dict[Site, Tensor] = {}

    def recorder(site: Site) -> Edit:
        def record(h: Tensor) -> Tensor:
            states[site] = h
            if len(states) == len(set(sites)):
                raise _AllCaptured
            return h

        return record

    with intervene(lm, [(site, recorder(site)) for site in sites]), suppress(_AllCaptured):
        lm.trunk(ids, attention_mask)
    return states


@dataclass(frozen=True, eq=False)
class Entry:
    """The call of one block in a forward pass: what `resume` needs to run the blocks from there on again and again."""

    layer: int
    h: Tensor  # [b, s, d], resid_pre of the block
    arguments: dict  # masks and rotary tables, as the model made them


def enter(lm: LanguageModel, ids: Tensor, layer: int, attention_mask: Tensor | None = None) -> Entry:
    """Run the blocks before `layer`. Edits at `layer` and later, attached around `resume`, need no more than that.

    Raises ValueError for a layer that the model does not have.
    """
    calls: list[Entry] = []

    def stop(module, args, arguments):
        calls.append(Entry(layer, args[0], arguments))
        raise _AllCaptured

    handle = _block(lm, layer).register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with suppress(_AllCaptured):
            lm.trunk(ids, attention_mask)
    finally:
        handle.remove()
    return calls[0]


def resume(lm: LanguageModel, entry: Entry) -> Tensor:
    """Final normed hidden states [b, s, d] of the pass that `entry` belongs to, aligned as in `LanguageModel.hidden`."""
    h = entry.h
    for block in lm.model.model.layers[entry.layer :]:
        h = block(h, **entry.arguments)
    return lm.align(lm.model.model.norm(h))


class _AllCaptured(Exception):
    """Ends a forward pass that has given all it was asked for."""


def _block(lm: LanguageModel, layer: int) -> nn.Module:
    if not 0 <= layer < lm.n_layers:
        raise ValueError(f"layer {layer}; {lm.name} has layers 0 to {lm.n_layers - 1}")
    return lm.model.model.layers[layer]


def _attach(lm: LanguageModel, site: Site, edit: Edit) -> list[torch.utils.hooks.RemovableHandle]:
    block = _block(lm, site.layer)
    match site.name:
        case "resid_pre":
            return [_on_input(block, edit)]
        case "resid_post":
            return [_on_output(block, edit)]
        case "attn_out":
            return [_on_output(block.self_attn.o_proj, edit)]
        case "mlp_out":
            return [_on_output(block.mlp, edit)]
        case "resid_mid":
            return _on_resid_mid(block, edit)


def _on_input(module: nn.Module, edit: Edit):
    def hook(module, args):
        return (edit(args[0]), *args[1:])

    return module.register_forward_pre_hook(hook)


def _on_output(module: nn.Module, edit: Edit, first: bool = False):
    def hook(module, args, output):
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    return module.register_forward_hook(hook, prepend=first)


def _on_resid_mid(block: nn.Module, edit: Edit) -> list:
    """No module returns resid_mid: the norm before the MLP reads it, and the residual path adds it to the block's output.

    So the norm gets the edited value, and the block's output the same change, once the MLP has run.
    """
    change: list[Tensor] = []

    def read(module, args):
        before = args[0]
        after = edit(before)
        change[:] = [] if after is before else [after - before]
        return (after, *args[1:])

    def carry(h: Tensor) -> Tensor:
        return h + change.pop() if change else h

    # First among the hooks on the output: edits of resid_post must see the change, whichever was attached earlier.
    return [block.post_attention_layernorm.register_forward_pre_hook(read), _on_output(block, carry, first=True)]
