"""One training run: what data/models/<name>/train.toml says.

Knows names and numbers; knows nothing of tensors.
"""

import math
import tomllib
from dataclasses import dataclass, fields
from typing import Literal

from ..paths import MODELS


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field."""


@dataclass(frozen=True)
class Phase:
    """Until this share of the steps, a step reads so many rows of documents and of chat, each as one micro-batch."""

    until: float
    documents: int
    chat: int


@dataclass(frozen=True)
class TrainConfig:
    """The fields of a configuration file.

    objective: causal or masked. parent: the model whose weights stay frozen below the new factors. rank, scaling: of W + scaling
    B A. seed: of everything drawn. steps: optimiser steps; the rate rises over `warmup` steps, stays until the share `hold` of
    all, and falls to 2 % along a cosine. learning_rate, embedding_rate: AdamW, of factors and of embedding rows. lowest_rate:
    smallest masking rate t. tail: most ends of turn behind a response. answers: prompts that the base answers itself. documents,
    chat: shares of the sources. phases: see Phase.
    """

    objective: Literal["causal", "masked"]
    parent: str
    rank: int
    scaling: float
    seed: int
    steps: int
    warmup: int
    hold: float
    learning_rate: float
    embedding_rate: float
    answers: int
    documents: dict[str, float]
    chat: dict[str, float]
    phases: tuple[Phase, ...]
    lowest_rate: float = 0.02
    tail: int = 1

    @classmethod
    def of(cls, name: str) -> "TrainConfig":
        path = MODELS / name / "train.toml"
        if not path.exists():
            choices = ", ".join(sorted(path.parent.name for path in MODELS.glob("*/train.toml")))
            raise ConfigError(f"no model {name!r} to train: data/models has a train.toml for {choices}")
        return cls.parse(tomllib.loads(path.read_text(encoding="utf8")))

    @classmethod
    def parse(cls, table: dict) -> "TrainConfig":
        if unknown := table.keys() - {field.name for field in fields(cls)}:
            raise ConfigError(f"unknown fields {', '.join(sorted(unknown))}")
        config = cls(**table | {"phases": tuple(Phase(**phase) for phase in table["phases"])})
        if config.objective not in ("causal", "masked"):
            raise ConfigError(f"objective {config.objective!r} is neither causal nor masked")
        if [phase.until for phase in config.phases] != sorted(phase.until for phase in config.phases) or config.phases[
            -1
        ].until != 1:
            raise ConfigError("phases must come in order, and the last must be until = 1.0")
        return config

    def phase(self, step: int) -> Phase:
        return next(phase for phase in self.phases if step < phase.until * self.steps)

    def rate(self, step: int) -> float:
        """Learning rate of `step` (0 is the first) as a share of the highest."""
        falling = max(0.0, (step / self.steps - self.hold) / (1 - self.hold))
        return min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * falling)) / 2)
