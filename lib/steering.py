"""What to do with a direction, where and when. Interventions are values: they hold no state and change no model.

With Q [k, d] the orthonormal basis of a direction and h one position of the residual stream:

    ablate  h - strength * Q'Q h         remove the component            (arXiv 2406.11717, eq. 4, at strength 1)
    add     h + strength * scale * q     move along a single direction   (eq. 3; scale = distance of the class means)
    clamp   h - strength * Q'(Q h - to)  set the component; to = the harmless mean is affine ablation (arXiv 2411.09003)

A `Scope` says which tokens and which denoising steps; it is resolved to one mask a step, not one a layer.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from .extraction import Direction
from .hooking import SITES, Edit, Site, SiteName, intervene
from .models import LanguageModel
from .prompts import REGIONS, RESPONSE

Tokens = Literal["all", "prompt", "response", "pre_instruction", "instruction", "post_instruction", "masked"]


@dataclass(frozen=True)
class StepState:
    """What a scope may ask at one denoising step. The sampler makes one a step; it is also the state of a single forward pass.

    regions: [b, s] codes of prompts.REGIONS. masked: [b, s], the slots that hold the mask token now. start: absolute position
    of the first column that the forward pass sees (with a key-value cache it sees only the last columns).
    """

    regions: Tensor
    masked: Tensor
    step: int = 0
    n_steps: int = 1
    block: int = 0
    n_blocks: int = 1
    start: int = 0


@dataclass(frozen=True)
class Scope:
    """Where and when: a token set, and half-open windows of denoising steps and blocks (slices, as in a list of all steps).

    Steps count over the whole generation. `masked` means the slots that hold the mask token at that step; in models with a
    logit shift a slot is scored from the position before it, which is not counted as masked for that reason.
    """

    tokens: Tokens = "all"
    steps: slice = field(default_factory=lambda: slice(None))
    blocks: slice = field(default_factory=lambda: slice(None))

    def __post_init__(self):
        if self.tokens not in get_args(Tokens):
            raise ValueError(f"tokens {self.tokens!r}; use one of {', '.join(get_args(Tokens))}")
        for name in ("steps", "blocks"):
            if not isinstance(getattr(self, name), slice):
                raise ValueError(f"{name} must be a slice such as slice(0, 8), got {getattr(self, name)!r}")

    def resolve(self, state: StepState) -> Tensor | bool:
        """True (every position), False (nowhere at this step), or a bool mask [b, s]."""
        if state.step not in range(*self.steps.indices(state.n_steps)):
            return False
        if state.block not in range(*self.blocks.indices(state.n_blocks)):
            return False
        if self.tokens == "all":
            return True
        if self.tokens == "masked":
            return state.masked
        if self.tokens == "prompt":
            return (state.regions > 0) & (state.regions < RESPONSE)
        return state.regions == REGIONS[self.tokens]


@dataclass(frozen=True, eq=False)
class Intervention:
    """One operation with one direction at some sites of some layers (None: all), within a scope.

    strength: for `add` in distances of the class means; for `ablate` and `clamp` the share of the change that is made at each site.
    """

    operation: Literal["ablate", "add", "clamp"]
    direction: Direction
    sites: tuple[SiteName, ...]
    layers: tuple[int, ...] | None
    scope: Scope
    strength: float = 1.0
    to: Tensor | None = None  # clamp: [k], or [n_layers, k]

    @property
    def first_layer(self) -> int:
        """The first layer that it touches."""
        return min(self.layers, default=0) if self.layers is not None else 0

    def edit(self, layer: int, device: torch.device) -> Edit | None:
        """The change of h [b, s, d] at `layer`, computed in float32 or wider; None where it is the identity."""
        if not self.strength:
            return None
        basis = self.direction.basis.to(device)
        match self.operation:
            case "add":
                offset = self.strength * self.direction.scale[layer].item() * basis[0]
                return lambda h: (_wide(h) + offset).to(h.dtype)
            case "ablate":
                return lambda h: _replace_component(h, basis, None, self.strength)
            case "clamp":
                to = (self.to[layer] if self.to.ndim == 2 else self.to).to(device)
                return lambda h: _replace_component(h, basis, to, self.strength)


def ablate(
    direction: Direction,
    sites: Sequence[SiteName] = ("resid_pre", "attn_out", "mlp_out"),
    layers: int | Iterable[int] | None = None,
    scope: Scope = Scope(),
    strength: float = 1.0,
) -> Intervention:
    """Remove the direction; by default wherever the residual stream is read or written, in every layer, so it cannot return.

    strength: the share that is removed at each site.
    """
    return Intervention("ablate", direction, _sites(sites), _layers(layers), scope, strength)


def add(
    direction: Direction,
    strength: float = 1.0,
    layer: int | None = None,
    site: SiteName = "resid_pre",
    scope: Scope = Scope(),
) -> Intervention:
    """Move along the direction, at its own layer unless told: strength 1 is the distance of the class means at that layer.

    Raises ValueError for a direction of k > 1.
    """
    if direction.k != 1:
        raise ValueError(f"add needs a single direction, this one spans {direction.k} dimensions")
    return Intervention("add", direction, _sites([site]), _layers(direction.layer if layer is None else layer), scope, strength)


def clamp(
    direction: Direction,
    to: float | Sequence[float] | Tensor | None = None,
    layers: int | Iterable[int] | None = None,
    scope: Scope = Scope(),
    strength: float = 1.0,
) -> Intervention:
    """Set the projection at resid_pre: to a number, a [k] vector, a value per layer [n_layers, k], or (None) the harmless mean.

    strength: the share of the way there, at each layer. Raises ValueError for any other shape.
    """
    value = direction.reference if to is None else torch.as_tensor(to, dtype=torch.float32)
    if value.ndim == 0:
        value = value.expand(direction.k)
    if value.shape not in {(direction.k,), tuple(direction.reference.shape)}:
        raise ValueError(
            f"`to` has shape {tuple(value.shape)}; use a number, [{direction.k}] or {tuple(direction.reference.shape)}"
        )
    return Intervention("clamp", direction, ("resid_pre",), _layers(layers), scope, strength, value)


@contextmanager
def steering(lm: LanguageModel, interventions: Sequence[Intervention]) -> Iterator[Callable[[StepState], None]]:
    """Attach interventions for the duration of the block; yields `at(state)`, to be called before each forward pass.

    Raises DirectionMismatch for a direction of other weights, ValueError for a layer that the model does not have.
    """
    resolved: list[Tensor | bool] = [False] * len(interventions)
    edits: list[tuple[Site, Edit]] = []
    for i, intervention in enumerate(interventions):
        intervention.direction.check(lm)
        for layer in range(lm.n_layers) if intervention.layers is None else intervention.layers:
            if (edit := intervention.edit(layer, lm.device)) is not None:
                edits += [(Site(layer, site), _scoped(edit, resolved, i)) for site in intervention.sites]

    def at(state: StepState) -> None:
        for i, intervention in enumerate(interventions):
            where = intervention.scope.resolve(state)
            resolved[i] = where if isinstance(where, bool) else where[:, state.start :]

    with intervene(lm, edits):
        yield at


def _scoped(edit: Edit, resolved: list[Tensor | bool], i: int) -> Edit:
    def within_scope(h: Tensor) -> Tensor:
        where = resolved[i]
        if where is False:
            return h
        if where is True:
            return edit(h)
        if len(h) == 2 * len(where):  # classifier-free guidance runs [conditional; unconditional]: steer both alike
            where = where.repeat(2, 1)
        return torch.where(where[..., None], edit(h), h)

    return within_scope


def _wide(h: Tensor) -> Tensor:
    """bf16 arithmetic would leave half a percent of an ablated component."""
    return h.to(torch.promote_types(h.dtype, torch.float32))


def _replace_component(h: Tensor, basis: Tensor, to: Tensor | None, share: float) -> Tensor:
    wide = _wide(h).flatten(0, -2)
    basis = basis.to(wide.dtype)
    coordinates = wide @ basis.T
    if to is not None:
        coordinates = coordinates - to
    return (
        torch.addmm(wide, coordinates, basis, alpha=-share).to(h.dtype).view_as(h)
    )  # one pass over h: memory is what it costs


def _sites(sites: Sequence[SiteName]) -> tuple[SiteName, ...]:
    if isinstance(sites, str) or not sites or not set(sites) <= set(SITES):
        raise ValueError(f"sites {sites!r}; give a list of some of {', '.join(SITES)}")
    return tuple(sites)


def _layers(layers: int | Iterable[int] | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    return (layers,) if isinstance(layers, int) else tuple(layers)
