"""Which directions: activations at template positions, mean differences, principal components, and `Direction`.

The recipe of arXiv 2406.11717 as arXiv 2512.24143 uses it for masked diffusion models: one forward pass of the prompt alone,
and one candidate, the difference of class means, for every (layer, template position). Means are streamed in float64.
Choosing among candidates needs interventions and scores: see selection.py.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .hooking import Site, capture
from .models import LanguageModel
from .prompts import batches, encode, template

FORMAT_VERSION = "1"


class DirectionMismatch(ValueError):
    """A direction was used on a model that it was not made for."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A subspace of the residual stream, with where it came from.

    basis: [k, d] orthonormal rows, float32; k = 1 is the single direction. layer, position: the cell it comes from.
    scale: [n_layers] distance of the two class means at each layer (at `position`), the unit of `add`'s strength.
    reference: [n_layers, k] projections of the harmless mean at each layer, what `clamp` sets by default.
    fingerprint: the weights it belongs to; None once `unbound`.
    """

    basis: Tensor
    scale: Tensor
    layer: int
    position: int | None
    reference: Tensor
    fingerprint: str | None
    provenance: dict = field(default_factory=dict)
    _TENSORS: ClassVar = ("basis", "scale", "reference")

    def __post_init__(self):
        if self.basis.ndim != 2 or not torch.allclose(self.basis @ self.basis.T, torch.eye(len(self.basis)), atol=1e-4):
            raise ValueError(f"basis must be [k, d] with orthonormal rows, got shape {tuple(self.basis.shape)}")

    @property
    def k(self) -> int:
        return len(self.basis)

    def check(self, lm: LanguageModel) -> None:
        """Raise DirectionMismatch unless this direction belongs to the weights of `lm`."""
        if self.basis.shape[1] != lm.d_model:
            raise DirectionMismatch(f"the direction has d = {self.basis.shape[1]}, {lm.name} has d_model = {lm.d_model}")
        if self.fingerprint is not None and self.fingerprint != lm.fingerprint:
            raise DirectionMismatch(
                f"the direction was made for weights {self.fingerprint} ({self.provenance.get('model', 'unknown')}), {lm.name} has "
                f"{lm.fingerprint}; for a transfer study use direction.unbound()"
            )

    def noting(self, **facts) -> "Direction":
        """The same direction with more provenance (JSON values): seeds, scores, whatever a reader of the file must know."""
        return replace(self, provenance=self.provenance | facts)

    def unbound(self) -> "Direction":
        """The same direction for use on any model of the same width: transfer studies say so by calling this."""
        return replace(self, fingerprint=None)

    def save(self, path: str | Path) -> None:
        """Write the tensors as safetensors, everything else as JSON in its metadata."""
        facts = dict(layer=self.layer, position=self.position, fingerprint=self.fingerprint)
        tensors = {name: getattr(self, name).contiguous() for name in self._TENSORS}
        metadata = {
            "format_version": FORMAT_VERSION,
            "facts": json.dumps(facts),
            "provenance": json.dumps(self.provenance),
        }
        save_file(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Direction":
        """Read a saved direction. Raises ValueError for a file that is not one, or is of a later format."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format_version") != FORMAT_VERSION:
                found = metadata.get("format_version", "no format_version")
                raise ValueError(f"{path} is not a direction of format {FORMAT_VERSION} (found: {found})")
            facts, provenance = json.loads(metadata["facts"]), json.loads(metadata["provenance"])
            return cls(**{name: file.get_tensor(name) for name in cls._TENSORS}, **facts, provenance=provenance)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Class means at every template position and layer: [p, l, d] float64 each; one candidate direction per cell.

    A position that is None stands for a mean over several: all tokens of a prompt, or the masked slots of a response.
    """

    harmful_mean: Tensor
    harmless_mean: Tensor
    positions: tuple[int | None, ...]
    fingerprint: str
    provenance: dict

    @property
    def difference(self) -> Tensor:
        """Raw mean differences [p, l, d]."""
        return self.harmful_mean - self.harmless_mean

    @property
    def cells(self) -> list[tuple[int, int | None]]:
        """(layer, position) of every cell whose two means differ: the others, such as the first token's, have no direction."""
        exists = self.difference.norm(dim=-1) > 1e-6 * self.harmless_mean.norm(dim=-1)
        return [(layer, position) for position, row in zip(self.positions, exists) for layer, there in enumerate(row) if there]

    def direction(self, layer: int, position: int | None, vectors: Tensor | None = None) -> Direction:
        """The unit mean difference of one cell; or the span of `vectors` [k, d] with this cell's scales and harmless means.

        Raises ValueError for a cell that is not in the grid, or one whose two means are equal (no direction).
        """
        if position not in self.positions or not 0 <= layer < self.harmful_mean.shape[1]:
            raise ValueError(f"no candidate at layer {layer}, position {position}; positions: {self.positions}")
        p = self.positions.index(position)
        raw = self.difference[p, layer]
        if (layer, position) not in self.cells:
            raise ValueError(f"harmful and harmless means are equal at layer {layer}, position {position}: no direction there")
        basis = orthonormal(raw[None] if vectors is None else vectors)
        return Direction(
            basis=basis,
            scale=self.difference[p].norm(dim=-1).float(),
            layer=layer,
            position=position,
            reference=(self.harmless_mean[p] @ basis.double().T).float(),
            fingerprint=self.fingerprint,
            provenance=self.provenance,
        )


def mean_difference(
    lm: LanguageModel, harmful: Sequence[str], harmless: Sequence[str], n_slots: int = 0, batch_size: int = 32
) -> Candidates:
    """Candidates from resid_pre of every layer at every template position; `n_slots` > 0 adds an empty (masked) response to the canvas."""
    means = []
    for instructions in (harmful, harmless):
        total = sum(states.double().sum(0).cpu() for _, states in _states(lm, instructions, n_slots, batch_size))
        means.append(total / len(instructions))
    around = template(lm)
    provenance = dict(
        model=lm.name,
        prompts=_hash([*harmful, *harmless]),
        n=[len(harmful), len(harmless)],
        template=_hash([*map(str, around.pre), "|", *map(str, around.post)]),
        n_slots=n_slots,
    )
    return Candidates(*means, positions=around.positions, fingerprint=lm.fingerprint, provenance=provenance)


def activations(lm: LanguageModel, instructions: Sequence[str], n_slots: int = 0, batch_size: int = 32) -> Tensor:
    """resid_pre at the template positions of every layer: [n, p, l, d] float32 on the CPU."""
    states: dict[int, Tensor] = {}
    for rows, batch in _states(lm, instructions, n_slots, batch_size):
        states |= zip(rows, batch.float().cpu(), strict=True)
    return torch.stack([states[i] for i in range(len(instructions))])


def _states(
    lm: LanguageModel, instructions: Sequence[str], n_slots: int, batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices [b] and activations [b, p, l, d] of one batch after another."""
    if not template(lm).positions:
        raise ValueError(f"{lm.name} has no chat template, so it has no template positions to take activations from")
    sites = [Site(layer) for layer in range(lm.n_layers)]
    positions = torch.tensor(template(lm).positions, device=lm.device)
    for indices in batches(lm, instructions, batch_size):
        ids, attention_mask = encode(lm, [instructions[i] for i in indices], n_slots)
        first = (attention_mask == 0).sum(1, keepdim=True)
        columns = torch.where(positions >= 0, first + positions, ids.shape[1] - n_slots + positions)  # [b, p]
        rows = torch.arange(len(ids), device=lm.device)[:, None]
        states = capture(lm, ids, sites, attention_mask)
        yield indices, torch.stack([states[site][rows, columns] for site in sites], dim=2)


def principal_components(x: Tensor) -> tuple[Tensor, Tensor]:
    """PCA of x [n, d]: (components [min(n, d), d] by falling variance, their shares of the total variance)."""
    centred = x.double() - x.double().mean(0)
    _, s, components = torch.linalg.svd(centred, full_matrices=False)
    return components.float(), (s**2 / (s**2).sum()).float()


def orthonormal(vectors: Tensor) -> Tensor:
    """An orthonormal basis [k, d] (float32) of the span of vectors [k, d]; row 0 keeps the first vector's direction."""
    q, r = torch.linalg.qr(vectors.double().T)
    if (r.diagonal().abs() < 1e-9 * vectors.double().norm(dim=1).max()).any():
        raise ValueError("the vectors are linearly dependent: they span fewer dimensions than their number")
    return (q * r.diagonal().sign()).T.float().contiguous()


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()[:16]
