"""What models are made of: plain functions of tensors, and thin modules that hold the weights.

torch's nn.Linear and nn.LayerNorm serve as they are. What is added here keeps no state: randomness
comes in as a key, positions are computed, caches are arguments.

Dimension key: ... batch dims, T queries, S keys, D width, H heads, K head dim, N positions.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from msfs_kernels import ahead
from msfs_kernels.embedding_gradient import embedding_gradient
from torch import Tensor, nn

from msfs_functional import random
from msfs_functional.attention import Implementation, attention, attention_weights
from msfs_functional.params import forward_mode
from msfs_functional.regions import region
from msfs_functional.side_by_side import address

Activation = Literal["relu", "gelu", "gelu_tanh", "quick_gelu", "swish"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # Hendrycks and Gimpel 2016, CLIP's
    "swish": F.silu,
}


def sinusoidal_positions(
    positions: Int[Tensor, "N"],
    width: int,
    *,
    layout: Literal["interleaved", "halves"] = "interleaved",
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "N D"]:
    """Sines and cosines of geometrically falling frequency, one row for each position.

        angle(n, c) = n / 10000^(2c / D)
        interleaved  sin a0, cos a0, sin a1, cos a1, ...     (the paper, tensor2tensor aside)
        halves       sin a0, sin a1, ..., cos a0, cos a1, ...    (Marian)

    Angles are taken in float64: in float32 the angle of position 1000 is already 3e-5 off.

    Raises:
        ValueError: an odd width.

    Source: Vaswani et al. 2017, section 3.5.
    """
    if width % 2:
        raise ValueError(f"width ({width}) must be even: positions pair a sine with a cosine")
    pairs = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64)
    frequencies = torch.exp(pairs * (-math.log(10000.0) / width))
    angles = positions[:, None].to(torch.float64) * frequencies
    waves = (angles.sin().to(dtype), angles.cos().to(dtype))
    return torch.stack(waves, -1).flatten(-2) if layout == "interleaved" else torch.cat(waves, -1)


class _Lookup(torch.autograd.Function):
    """Rows of each member's matrix, in one gather, and one sum over all members' rows back.

        weight (N, V, D), tokens (N, ...)  ->  rows (N, ..., D)

    torch's own rule under vmap gathers from (V, N D): it copies the matrices first, and their
    gradient, strided as no parameter is, is copied again by all who read it. Here members may lie
    apart (`side_by_side`): they are rows of the memory that holds them.
    """

    @staticmethod
    def forward(weight: Tensor, tokens: Tensor) -> Tensor:
        (N, V, D), apart = weight.shape, weight.stride(0)
        if address(weight) is None or weight.stride()[1:] != (D, 1) or apart % D:
            weight, apart = weight.contiguous(), V * D
        rows = weight.as_strided((apart // D * (N - 1) + V, D), (D, 1), weight.storage_offset())
        return F.embedding(_of_members(tokens, apart // D, V, len(rows)), rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        weight, tokens = inputs
        ctx.save_for_backward(tokens)
        ctx.rows = weight.shape[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        (tokens,), N, V = ctx.saved_tensors, grad.shape[0], ctx.rows
        index, fn = _of_members(tokens, V, V, N * V), torch.ops.aten.embedding_dense_backward
        return fn(grad, index, N * V, -1, False).unflatten(0, (N, -1)), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, weight: Tensor, tokens: Tensor) -> tuple[Tensor, int]:
        M = info.batch_size
        weight, tokens = (
            x.expand(M, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip((weight, tokens), in_dims, strict=True)
        )
        rows: Any = _Lookup.apply(weight.flatten(0, 1), tokens.flatten(0, 1))
        return rows.unflatten(0, (M, -1)), 0


def _of_members(tokens: Tensor, apart: int, V: int, beyond: int) -> Tensor:
    """tokens (N, ...) + n apart, for rows of matrices that begin so many rows apart.

    A token that is none of V becomes `beyond`, which every lookup refuses: the row behind a
    member's last one is another member's.
    """
    N = tokens.shape[0]
    starts = torch.arange(N, device=tokens.device) * apart
    rows = tokens + starts.view(N, *[1] * (tokens.ndim - 1))
    return torch.where((tokens >= 0) & (tokens < V), rows, beyond)


def mapped() -> bool:
    """Whether a vmap of torch.func is on its way."""
    stack = torch._C._functorch.get_interpreter_stack() or []  # pyright: ignore
    vmap = torch._C._functorch.TransformType.Vmap  # pyright: ignore
    return any(level.key() == vmap for level in stack)


class _SortedLookup(torch.autograd.Function):
    """Rows of a matrix on a GPU, whose gradient is summed token by token in sorted order.

    torch's own kernels take 0.55 ms for 32,768 rows of 768, these a quarter (kernels/LOG.md).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(tokens)
        ctx.rows = weight.shape[0]
        rows = F.embedding(tokens, weight)
        ahead.expect(embedding_gradient, (rows.flatten(0, -2), tokens.flatten(), ctx.rows))
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        (tokens,), rows = ctx.saved_tensors, ctx.rows
        if torch.is_grad_enabled():  # it is differentiated itself
            return torch.ops.aten.embedding_dense_backward(grad, tokens, rows, -1, False), None
        return embedding_gradient(grad.flatten(0, -2), tokens.flatten(), rows), None


def on_gpu_alone(*tensors: Tensor) -> bool:
    """Whether these are plain floating tensors of at most 32 bits on a GPU, which nothing but the
    autograd engine looks at: no transform of torch.func, no compiler, no forward mode."""
    plain = all(
        x.is_cuda
        and type(x) in (Tensor, nn.Parameter)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        for x in tensors
    )
    return (
        plain
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.get_interpreter_stack()  # pyright: ignore
        and not forward_mode()
    )


def lookup(weight: Float[Tensor, "V D"], tokens: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
    """F.embedding(tokens, weight), under vmap over weights without copies of them.

    A token that is no row is refused there too, where F.embedding reads the next member's rows:
    an IndexError on the CPU, compiled a RuntimeError, on a GPU a device-side assertion.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and not mapped():
        if weight.requires_grad and tokens.ndim and on_gpu_alone(weight):
            rows: Any = _SortedLookup.apply(weight, tokens)
            return rows
        return F.embedding(tokens, weight)
    if compiling or forward_mode():
        known = (tokens >= 0) & (tokens < weight.shape[0])
        nowhere = torch.iinfo(tokens.dtype).max // 2  # of no member, however many there are
        return F.embedding(torch.where(known, tokens, nowhere), weight)
    rows: Any = _Lookup.apply(weight[None], tokens[None])
    return rows[0]


class Embedding(nn.Embedding):
    """nn.Embedding by `lookup`: what is no row is refused in an ensemble, too, and compiled."""

    def __init__(self, rows: int, width: int):  # its other options (padding_idx, ...) are not here
        super().__init__(rows, width)

    def forward(self, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:  # pyright: ignore
        return lookup(self.weight, tokens)


_split = region(random.split)


def site_keys(key: Int64[Tensor, "2"] | None, n: int) -> list[Tensor | None]:
    """One key for each of n places that drop; all None (no dropout, evaluation) without a key."""
    return [None] * n if key is None else list(_split(key, n).unbind(0))


def fused_linear(x: Float[Tensor, "... D"], *layers: nn.Linear) -> list[Tensor]:
    """`[layer(x) for layer in layers]` as one matrix product over the stacked weights.

    Stacking copies the weights, which pays only when x has more rows than they have together:
    fewer (decoding a token at a time) are multiplied one layer after another.
    """
    sizes = [layer.weight.shape[0] for layer in layers]  # of a shard, perhaps
    if x.numel() // x.shape[-1] < sum(sizes):
        return [layer(x) for layer in layers]
    weight = torch.cat([layer.weight for layer in layers])
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    return list(F.linear(x, weight, torch.cat(biases) if biases else None).split(sizes, -1))


class MultiHeadAttention(nn.Module):
    """Attention with projections q, k, v, o; heads attend side by side in width / heads dims.

    Source: Vaswani et al. 2017, section 3.2.2.

    Raises:
        ValueError: heads do not divide the width, or kv_heads the heads.
    """

    def __init__(self, width: int, heads: int, *, kv_heads: int | None = None, bias: bool = True):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if min(width, heads, kv_heads) < 1 or width % heads:
            raise ValueError(f"heads ({heads}) must divide width ({width}), both positive")
        if heads % kv_heads:
            raise ValueError(f"kv_heads ({kv_heads}) must divide heads ({heads})")
        self.head_dim = width // heads
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.v = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.o = nn.Linear(width, width, bias=bias)

    def split_heads(self, x: Float[Tensor, "... T D"]) -> Float[Tensor, "... H T K"]:
        """(..., T, heads * head_dim) seen as (..., heads, T, head_dim): a view, no copy."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-2, -3)

    def keys_values(self, memory: Float[Tensor, "... S D"]) -> tuple[Tensor, Tensor]:
        """Keys and values of what is attended to, each (..., G, S, K): what a cache keeps."""
        k, v = fused_linear(memory, self.k, self.v)
        return self.split_heads(k), self.split_heads(v)

    def forward(
        self,
        x: Float[Tensor, "... T D"],
        keys_values: tuple[Tensor, Tensor] | None = None,
        *,
        store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        maps: list[Tensor] | None = None,
        key: Int64[Tensor, "2"] | None = None,
        dropout: float = 0.0,
        implementation: Implementation = "flash",
        **mask: Any,
    ) -> Float[Tensor, "... T D"]:
        """x attends to itself, or to the given `keys_values` of a memory.

        Args:
            store: takes x's own keys and values, returns those to attend to (a cache's).
            maps: a list to which the attention weights are appended, for pictures.
            key, dropout: of the attention weights; no key, no dropout.
            mask: options of `attention` (is_causal, key_lengths, bias, ...).
        """
        if keys_values is None:
            q, k, v = map(self.split_heads, fused_linear(x, self.q, self.k, self.v))
            k, v = (k, v) if store is None else store(k, v)
        else:
            q, (k, v) = self.split_heads(self.q(x)), keys_values
        if maps is not None:
            maps.append(attention_weights(q, k, **mask))
        dropped = {} if key is None or dropout == 0 else {"dropout": dropout, "dropout_key": key}
        heads = attention(q, k, v, implementation=implementation, **dropped, **mask)
        return self.o(heads.transpose(-2, -3).flatten(-2))


class FeedForward(nn.Module):
    """down(dropout(activation(up(x)))): the same two layers at every position.

    Source: Vaswani et al. 2017, section 3.3.
    """

    def __init__(self, width: int, hidden: int, activation: Activation, *, bias: bool = True):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation ({activation!r}) must be one of {list(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "... D"],
        *,
        key: Int64[Tensor, "2"] | None = None,
        dropout: float = 0.0,
    ) -> Float[Tensor, "... D"]:
        return self.down(random.dropout(key, self.activation(self.up(x)), dropout))
