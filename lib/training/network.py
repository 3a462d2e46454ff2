"""The base with trainable low-rank factors: W = W_frozen + scaling * B A, formed in the forward pass, so that it costs no extra
activations. Knows token ids and hidden states; knows nothing of data, losses or files.

The architecture is transformers' Llama (a test compares the two). One block function serves all layers, its weights passed as
arguments: torch.compile then compiles a block, not thirty of them.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
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
        self.frozen = nn.ParameterDict(
            {_key(name): nn.Parameter(tensor.to(dtype), requires_grad=False) for name, tensor in frozen.items()}
        )
        self.factors = nn.ParameterDict({_key(NEW_ROWS): nn.Parameter(new_rows.float().clone())})
        for name in matrix_names(shape):
            rows, columns = frozen[f"{name}.weight"].shape
            start = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
            self.factors[_key(f"{name}.lora_A")] = nn.Parameter(start)
            self.factors[_key(f"{name}.lora_B")] = nn.Parameter(torch.zeros(rows, rank))
        self._block, self._cross_entropy = block, cross_entropy
        if compiled:
            self._block = torch.compile(block, dynamic=False)
            self._cross_entropy = torch.compile(cross_entropy)

    def trained(self) -> dict[str, Tensor]:
        """What training changes, float32, under the adapter's names."""
        return {name.replace("/", "."): parameter for name, parameter in self.factors.items()}

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy [n], nats, of token ids [n] under the logits of hidden states [n, d]."""
        if self._cross_entropy is not cross_entropy:
            torch._dynamo.mark_dynamic(hidden, 0)  # how many slots are masked changes from batch to batch
            torch._dynamo.mark_dynamic(targets, 0)
        return self._cross_entropy(hidden, self.frozen[_key(EMBEDDING)], self.factors[_key(NEW_ROWS)], targets)

    def forward(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        """`seen` [b, s] (bool) marks the slots that attention may look at; None: all of them."""
        cos, sin = rotary(ids.shape[1], self.shape, ids.device)
        bias = None
        if seen is not None:
            bias = torch.zeros(seen.shape, dtype=self.dtype, device=ids.device).masked_fill(~seen, -torch.inf)[:, None, None]
        rows = torch.cat([self.frozen[_key(EMBEDDING)], self.factors[_key(NEW_ROWS)].to(self.dtype)])
        x = F.embedding(ids, rows)
        for layer in range(self.shape.layers):
            prefix = f"model.layers.{layer}."
            norms = [self._frozen(prefix + norm) for norm in ("input_layernorm", "post_attention_layernorm")]
            weights = [
                (self._frozen(prefix + matrix), *(self.factors[_key(f"{prefix}{matrix}.lora_{side}")] for side in "BA"))
                for matrix in MATRICES
            ]
            x = self._block(
                x, cos.to(self.dtype), sin.to(self.dtype), bias, norms, weights, self.shape, self.scaling, self.causal
            )
        return rms_norm(x, self._frozen("model.norm"), self.shape.eps)

    def _frozen(self, module: str) -> Tensor:
        return self.frozen[_key(f"{module}.weight")]


def matrix_names(shape: Shape) -> list[str]:
    """Every matrix that gets factors, in order."""
    return [f"model.layers.{layer}.{matrix}" for layer in range(shape.layers) for matrix in MATRICES]


def block(x, cos, sin, bias, norms, weights, shape: Shape, scaling: float, causal: bool) -> Tensor:
    """One pre-norm Llama block on x [b, s, d]. weights: (frozen W, B, A) for each of MATRICES."""
    q, k, v, o, gate, up, down = (frozen + scaling * (b.to(x.dtype) @ a.to(x.dtype)) for frozen, b, a in weights)
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


def _key(name: str) -> str:
    return name.replace(".", "/")  # parameter names may hold no dot
