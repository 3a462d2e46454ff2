"""The loop: batches from pools, a step, a checkpoint. One seed gives one run, and a run that was stopped goes on bit for bit.

State is weights, AdamW's moments, two generators (host and device) and how far each pool has been read: all in one safetensors
file. Pools are read epoch by epoch, each epoch a permutation made from seed and epoch, so a position is a number.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..files import atomic
from .config import ConfigError, TrainConfig
from .data import CHAT, TEST, Dataset, Pool
from .network import Network
from .objectives import Batch, causal_loss, masked_loss, stratified

HELD_OUT = 256  # first rows of each kind of document, never trained on
SAVE_EVERY, LOG_EVERY = 90, 25  # seconds; steps


class Stream:
    """Row numbers `first` ... n - 1 without end, a new permutation each epoch; `position` counts the rows read."""

    def __init__(self, n: int, first: int, seed: int):
        self.n, self.first, self.seed, self.position = n - first, first, seed, 0
        self._epoch, self._order = -1, torch.empty(0)

    def take(self, count: int) -> Tensor:
        """The next `count` row numbers [count]."""
        taken = []
        while count:
            epoch, at = divmod(self.position, self.n)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator) + self.first
            part = self._order[at : at + count]
            taken.append(part)
            self.position += len(part)
            count -= len(part)
        return torch.cat(taken)


class Mixture:
    """Rows drawn from several sources by share."""

    def __init__(self, sizes: dict[str, int], shares: dict[str, float], first: int, seed: int):
        if unknown := shares.keys() - sizes.keys():
            raise ConfigError(f"no such source: {', '.join(sorted(unknown))}; there are {', '.join(sorted(sizes))}")
        self.shares = shares
        self.streams = {name: Stream(sizes[name], first, seed + i) for i, name in enumerate(sorted(shares))}

    def take(self, rows: int) -> list[tuple[str, Tensor]]:
        """(source, row numbers), `rows` in all: the nearest whole numbers to the shares that add up to them."""
        whole = {name: rows * share / sum(self.shares.values()) for name, share in self.shares.items()}
        counts = {name: int(exact) for name, exact in whole.items()}
        for name in sorted(whole, key=lambda name: counts[name] - whole[name])[: rows - sum(counts.values())]:
            counts[name] += 1
        return [(name, self.streams[name].take(count)) for name, count in counts.items() if count]


class Trainer:
    """A run in progress. `step()` until `done`; `save` and `restore` at any step between."""

    def __init__(self, config: TrainConfig, network: Network, dataset: Dataset, mask_id: int, device: torch.device):
        self.config, self.network, self.mask_id, self.device, self.steps_done = config, network, mask_id, device, 0
        self.documents = {name: rows.int().to(device) for name, rows in dataset.documents.items()}
        pools = {name: pool for name, pool in dataset.chat.items() if not name.startswith(TEST)}
        self.chat = {name: Pool(*(x.int().to(device) for x in (p.ids, p.prompt, p.total))) for name, p in pools.items()}
        sizes = ({name: len(rows) for name, rows in group.items()} for group in (self.documents, self.chat))
        self.mixtures = {
            "documents": Mixture(next(sizes), config.documents, HELD_OUT, 1000 * config.seed),
            "chat": Mixture(next(sizes), config.chat, 0, 1000 * config.seed + 500),
        }
        self.host = torch.Generator().manual_seed(config.seed)
        self.noise = torch.Generator(device).manual_seed(config.seed)
        factors = [*network.a.values(), *network.b.values()]
        groups = [(factors, config.learning_rate), ([network.new_rows], config.embedding_rate)]
        self.optimizer = torch.optim.AdamW(
            [dict(params=parameters, lr=rate, highest=rate) for parameters, rate in groups],
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=device.type == "cuda",
        )

    @property
    def done(self) -> bool:
        return self.steps_done >= self.config.steps

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; the losses (nats, on the device) of its document and chat micro-batches."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * self.config.rate(self.steps_done)
        losses, tokens = {}, self.tokens()
        for kind, batch in (("documents", self._documents), ("chat", self._chat)):
            loss = self._loss(batch())
            (loss * (tokens[kind] / sum(tokens.values()))).backward()
            losses[kind] = loss.detach()
        torch.nn.utils.clip_grad_norm_([*self.network.parameters()], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return losses

    def tokens(self) -> dict[str, int]:
        """Tokens of the next step, by kind."""
        phase = self.config.phase(self.steps_done)
        length = next(iter(self.documents.values())).shape[1]
        return {"documents": phase.documents * length, "chat": phase.chat * CHAT}

    def _loss(self, batch: Batch) -> Tensor:
        if self.config.objective == "causal":
            return causal_loss(self.network, batch)
        t = stratified(len(batch.ids), self.config.lowest_rate, self.host)
        if batch.seen is not None:  # chat: a response starts from all masks, and whether it refuses is decided there
            t = 1 - (1 - t) ** 2
        t = t.to(self.device)
        noise = torch.rand(batch.ids.shape, generator=self.noise, device=self.device)
        return masked_loss(self.network, batch, t, noise, self.mask_id)

    def _documents(self) -> Batch:
        drawn = self.mixtures["documents"].take(self.config.phase(self.steps_done).documents)
        ids = torch.cat([self.documents[name][rows.to(self.device)] for name, rows in drawn]).long()
        scored = torch.ones_like(ids, dtype=torch.bool)
        scored[:, 0] = False
        return Batch(ids, scored)

    def _chat(self) -> Batch:
        chosen = self.mixtures["chat"].take(self.config.phase(self.steps_done).chat)
        drawn = [(self.chat[name], rows.to(self.device)) for name, rows in chosen]
        ids, prompt, total = (torch.cat([getattr(p, field)[rows] for p, rows in drawn]) for field in ("ids", "prompt", "total"))
        return chat_batch(ids, prompt, total, self.config.tail, self.config.objective == "masked", self.host)

    # --- checkpoints ----------------------------------------------------------------------------------------------------------

    def _streams(self) -> dict[str, Stream]:
        return {f"{kind}.{name}": stream for kind, mixture in self.mixtures.items() for name, stream in mixture.streams.items()}

    def save(self, path: Path) -> None:
        tensors = {f"parameter.{name}": value.detach() for name, value in self.network.trained().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"moment.{number}.{key}": value for key, value in state.items()}
        tensors |= {"generator.host": self.host.get_state(), "generator.noise": self.noise.get_state()}
        positions = {name: stream.position for name, stream in self._streams().items()}
        notes = dict(step=self.steps_done, positions=positions, config=asdict(self.config))
        with atomic(path) as temporary:
            tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
            save_file(tensors, temporary, metadata={"notes": json.dumps(notes)})

    def restore(self, path: Path) -> None:
        """Go on where `save` was called. Raises ConfigError when train.toml has changed since."""
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["notes"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if notes["config"] != json.loads(json.dumps(asdict(self.config))):
            raise ConfigError(f"{path} was made with another train.toml: train without --resume, or restore the old file")
        with torch.no_grad():
            for name, parameter in self.network.trained().items():
                parameter.copy_(tensors[f"parameter.{name}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("moment.")]:
            _, number, key = name.split(".")
            moments.setdefault(int(number), {})[key] = tensors[name]
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.host.set_state(tensors["generator.host"])
        self.noise.set_state(tensors["generator.noise"])
        for name, stream in self._streams().items():
            stream.position = notes["positions"][name]
        self.steps_done = notes["step"]


def chat_batch(ids: Tensor, prompt: Tensor, total: Tensor, tail: int, bounded: bool, generator: torch.Generator) -> Batch:
    """Responses are scored, with 1 to `tail` ends of turn behind them; `bounded`: attention ends there, as a canvas does."""
    places = torch.arange(CHAT, device=ids.device)
    ends = total + torch.randint(1, tail + 1, total.shape, generator=generator).to(ids.device)
    exists = places < ends[:, None]
    return Batch(ids.long(), exists & (places >= prompt[:, None]), exists if bounded else None)


def run(trainer: Trainer, checkpoint: Path, log: Path, name: str) -> None:
    """Train to the end, with checkpoints on the way. Interrupted (Ctrl-C, SIGTERM), it saves and raises KeyboardInterrupt."""
    started, saved, tokens = time.monotonic(), time.monotonic(), 0
    with (
        _stopping() as asked,
        tqdm(total=trainer.config.steps, initial=trainer.steps_done, desc=f"training {name}", mininterval=2) as bar,
        log.open("a") as lines,
    ):
        while not trainer.done:
            tokens += sum(trainer.tokens().values())
            losses = trainer.step()
            bar.update()
            if trainer.steps_done % LOG_EVERY == 0 or trainer.done:
                values = {kind: round(loss.item(), 4) for kind, loss in losses.items()}
                bar.set_postfix(values)
                seconds = round(time.monotonic() - started, 1)
                lines.write(json.dumps(dict(step=trainer.steps_done, seconds=seconds, tokens=tokens) | values) + "\n")
                lines.flush()
            if trainer.done or asked or time.monotonic() - saved > SAVE_EVERY:
                trainer.save(checkpoint)
                saved = time.monotonic()
            if asked and not trainer.done:
                raise KeyboardInterrupt


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """Collects stop signals, so that a step is finished before they are obeyed."""
    asked: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda received, frame: asked.append(received)) for number in signals]
    try:
        yield asked
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
