"""The base with trainable low-rank factors: W = W_frozen + scaling * B A, formed in the forward pass, so that it costs no extra
activations. Knows token ids and hidden states; knows nothing of data, losses or files.

The architecture is transformers' Llama (a test compares the two). One block function serves all layers, its weights passed as
arguments: torch.compile then compiles a block, not thirty of them. Each kind of matrix is stored as one tensor for all layers:
seven batched products form all weights, where 210 small ones would keep the GPU waiting for its host.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm")
EMBEDDING, NEW_ROWS = "model.embed_tokens.weight", "model.embed_tokens.new_rows"


@dataclass(frozen=True)
class Shape:
    """The fields of a Llama config.json that the forward pass needs."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    eps: float

    @classmethod
    def of(cls, config: dict) -> "Shape":
        return cls(
            config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"],
            config["rope_theta"], config["rms_norm_eps"],
        )  # fmt: skip


class Network(nn.Module):
    """Token ids [b, s] -> final normed hidden states [b, s, d]; the state at i predicts token i + 1, in every objective.

    `frozen`: float tensors under Hugging Face names. `new_rows` [n, d]: trainable embedding rows behind the frozen ones; the
    head is tied. Factors start as A ~ N(0, 1/in) and B = 0, so that training starts from the frozen model exactly.
    """

    def __init__(
        self,
        frozen: dict[str, Tensor],
        new_rows: Tensor,
        shape: Shape,
        rank: int,
        scaling: float,
        causal: bool,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ):
        super().__init__()
        self.shape, self.scaling, self.causal, self.dtype = shape, scaling, causal, dtype

        def kept(tensor: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.to(dtype), requires_grad=False)

        def stacked(name: str) -> Tensor:
            return torch.stack([frozen[f"{_layer(layer)}{name}.weight"] for layer in range(shape.layers)])

        self.embedding, self.norm = kept(frozen[EMBEDDING]), kept(frozen["model.norm.weight"])
        self.frozen = nn.ParameterDict({_key(name): kept(stacked(name)) for name in (*MATRICES, *NORMS)})
        self.new_rows = nn.Parameter(new_rows.float().clone())
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name in map(_key, MATRICES):
            layers, rows, columns = self.frozen[name].shape
            start = torch.randn(layers, rank, columns, generator=generator) / math.sqrt(columns)
            self.a[name], self.b[name] = nn.Parameter(start), nn.Parameter(torch.zeros(layers, rows, rank))
        self._block, self._cross_entropy = block, cross_entropy
        if compiled:
            self._block = torch.compile(block, dynamic=False)
            self._cross_entropy = torch.compile(cross_entropy)

    def trained(self) -> dict[str, Tensor]:
        """What training changes, float32, under the adapter's names; views of the parameters."""
        views = {NEW_ROWS: self.new_rows}
        for layer in range(self.shape.layers):
            for name in MATRICES:
                for side, stack in (("A", self.a), ("B", self.b)):
                    views[f"{_layer(layer)}{name}.lora_{side}"] = stack[_key(name)][layer]
        return views

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy [n], nats, of token ids [n] under the logits of hidden states [n, d]."""
        if self._cross_entropy is not cross_entropy:
            torch._dynamo.mark_dynamic(hidden, 0)  # how many slots are masked changes from batch to batch
            torch._dynamo.mark_dynamic(targets, 0)
        return self._cross_entropy(hidden, self.embedding, self.new_rows, targets)

    def forward(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        """`seen` [b, s] (bool) marks the slots that attention may look at; None: all of them."""
        cos, sin = rotary(ids.shape[1], self.shape, ids.device)
        bias = None
        if seen is not None:
            bias = torch.zeros(seen.shape, dtype=self.dtype, device=ids.device).masked_fill(~seen, -torch.inf)[:, None, None]
        x = F.embedding(ids, torch.cat([self.embedding, self.new_rows.to(self.dtype)]))
        for norms, weights in zip(self._layers(NORMS, self._frozen), self._layers(MATRICES, self._merged), strict=True):
            x = self._block(x, cos.to(self.dtype), sin.to(self.dtype), bias, norms, weights, self.shape, self.causal)
        return rms_norm(x, self.norm, self.shape.eps)

    def _layers(self, names: tuple[str, ...], tensor: Callable[[str], Tensor]) -> list[tuple[Tensor, ...]]:
        """The named tensors layer by layer; unbound at once, because the gradient of an index is as large as the whole stack."""
        return list(zip(*(tensor(_key(name)).unbind() for name in names), strict=True))

    def _frozen(self, key: str) -> Tensor:
        return self.frozen[key]

    def _merged(self, key: str) -> Tensor:
        return torch.baddbmm(self.frozen[key], self.b[key].to(self.dtype), self.a[key].to(self.dtype), alpha=self.scaling)


def block(x, cos, sin, bias, norms, weights, shape: Shape, causal: bool) -> Tensor:
    """One pre-norm Llama block on x [b, s, d]. weights: one for each of MATRICES."""
    q, k, v, o, gate, up, down = weights
    h = rms_norm(x, norms[0], shape.eps)

    def heads(matrix: Tensor, n: int) -> Tensor:
        return F.linear(h, matrix).unflatten(-1, (n, shape.head_dim)).transpose(1, 2)

    repeats = shape.heads // shape.kv_heads
    attended = F.scaled_dot_product_attention(
        rotated(heads(q, shape.heads), cos, sin),
        rotated(heads(k, shape.kv_heads), cos, sin).repeat_interleave(repeats, 1),
        heads(v, shape.kv_heads).repeat_interleave(repeats, 1),
        attn_mask=bias,
        is_causal=causal,
    )
    x = x + F.linear(attended.transpose(1, 2).flatten(2), o)
    h = rms_norm(x, norms[1], shape.eps)
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def cross_entropy(hidden: Tensor, frozen_rows: Tensor, new_rows: Tensor, targets: Tensor) -> Tensor:
    """Losses [n] with the tied head in two parts: the frozen one then needs no gradient of its 49,152 rows."""
    logits = torch.cat([F.linear(hidden, frozen_rows), F.linear(hidden, new_rows.to(hidden.dtype))], -1)
    return F.cross_entropy(logits.float(), targets, reduction="none")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, computed in float32 (arXiv 1910.07467)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotary(length: int, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_dim / 2] of rotary positions (arXiv 2104.09864), float32."""
    frequencies = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _layer(layer: int) -> str:
    return f"model.layers.{layer}."


def _key(name: str) -> str:
    return name.replace(".", "/")  # parameter names may hold no dot
