"""Settings of the decoder: GPT-2, Llama 3, Qwen 3, Gemma 2, Mistral and SmolLM2 are some of them.

`pretrained` reads them from a published folder's config.json; sizes that this project trains have
names here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from msfs_functional.layers import ACTIVATIONS, Activation
from msfs_functional.rotary import Scaling


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options; the defaults are Llama's choices at GPT-2's smallest size."""

    vocab: int  # tokens
    width: int = 768
    depth: int = 12  # blocks
    heads: int = 12
    kv_heads: int | None = None  # key heads, each shared by heads / kv_heads; default: heads
    head_dim: int | None = None  # default: width / heads
    hidden: int = 2048  # width of the feed-forward layers
    max_length: int = 1024  # tokens; longer sequences are refused
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: bool = False  # gains are 1 + weight, weights start at zero (Gemma)
    post_norm: bool = False  # also norm what a sublayer adds (Gemma 2)
    qk_norm: bool = False  # RMSNorm of each head's queries and keys (Qwen 3)
    positions: Literal["rotary", "learned"] = "rotary"
    rotary_base: float = 10000.0
    rotary_scaling: Scaling | None = None
    windows: tuple[int | None, ...] = (None,)  # keys a token sees; layer i takes element i, cyclic
    attention_scale: float | None = None  # of q k^T; default head_dim ** -0.5
    attention_softcap: float | None = None  # scores become cap * tanh(scores / cap)
    logit_softcap: float | None = None  # the same for logits
    activation: Activation = "swish"
    gated: bool = True  # down(activation(gate(x)) * up(x)) instead of down(activation(up(x)))
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's last projection
    hidden_bias: bool = False  # of the feed-forward layers
    norm_bias: bool = False  # LayerNorm's
    tied: bool = True  # the embedding is the output matrix, too
    embedding_scale: float = 1.0  # Gemma: width ** 0.5
    dropout: float = 0.0  # probability, on embeddings and on what each sublayer adds
    attention_dropout: float = 0.0  # probability, on attention weights
    fused: bool = False  # q, k, v in one matrix, gate and up in another (`fuse`), gains in them

    def __post_init__(self):
        for name in ("vocab", "width", "depth", "heads", "hidden", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("kv_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1, or None for the default")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"heads ({self.heads}) must divide width ({self.width}), or head_dim be given"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.positions == "rotary" and self.size_of_head % 2:
            raise ValueError(f"head_dim ({self.size_of_head}) must be even for rotary positions")
        if not self.windows or any(w is not None and w < 1 for w in self.windows):
            raise ValueError(f"windows {self.windows} must hold sizes of at least 1, or None")
        if self.norm_bias and self.norm != "layer":
            raise ValueError("norm_bias is for norm='layer': RMSNorm has no bias")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation ({self.activation!r}) must be in {list(ACTIVATIONS)}")
        for name in ("attention_softcap", "logit_softcap", "attention_scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} ({value}) must be positive, or None")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be in [0, 1)")

    @property
    def size_of_head(self) -> int:
        """K: head_dim, or what it is by default."""
        return self.head_dim or self.width // self.heads

    @property
    def projections(self) -> tuple[int, int, int]:
        """Rows of the matrices q, k and v."""
        rows = self.size_of_head * (self.kv_heads or self.heads)
        return self.size_of_head * self.heads, rows, rows

    def window(self, layer: int) -> int | None:
        """Keys that a token sees in a layer, itself included; None is all."""
        return self.windows[layer % len(self.windows)]


def gpt2(vocab: int = 50257, **options: Any) -> DecoderConfig:
    """GPT-2 (Radford et al. 2019), 124M parameters."""
    sizes = {
        "hidden": 3072,
        "norm": "layer",
        "positions": "learned",
        "activation": "gelu_tanh",
        "gated": False,
        "dropout": 0.1,
        "attention_dropout": 0.1,
    }
    biases = dict.fromkeys(("qkv_bias", "output_bias", "hidden_bias", "norm_bias"), True)
    return DecoderConfig(vocab, **{**sizes, **biases, **options})


def small(vocab: int = 49152, **options: Any) -> DecoderConfig:
    """SmolLM2's smallest (Allal et al. 2025), 135M parameters of Llama's kind."""
    sizes = {"width": 576, "depth": 30, "heads": 9, "kv_heads": 3, "hidden": 1536}
    rotary = {"rotary_base": 100000.0, "max_length": 8192}
    return DecoderConfig(vocab, **{**sizes, **rotary, **options})


def large(vocab: int = 50257, **options: Any) -> DecoderConfig:
    """1.3B parameters of Llama's kind: 24 blocks of 2048, sequences of 4096."""
    sizes = {"width": 2048, "depth": 24, "heads": 16, "hidden": 5504, "max_length": 4096}
    return DecoderConfig(vocab, **{**sizes, **options})


def tiny(vocab: int, **options: Any) -> DecoderConfig:
    """Learns simple stories on a laptop: 4 blocks of 128, 0.8M parameters and the embedding."""
    sizes = {"width": 128, "depth": 4, "heads": 4, "kv_heads": 2, "hidden": 384, "max_length": 256}
    return DecoderConfig(vocab, **{**sizes, **options})


def nano(vocab: int, **options: Any) -> DecoderConfig:
    """Learns stories of 200 words in minutes of two CPU cores: 3 blocks of 64, 0.16M parameters.

    Gates by ReLU: with swish, Llama's choice, so small a model takes twice the steps to find out
    who is who.
    """
    sizes = {"width": 64, "depth": 3, "heads": 4, "hidden": 192, "max_length": 224}
    return DecoderConfig(vocab, **{"activation": "relu", **sizes, **options})


PRESETS: dict[str, Callable[..., DecoderConfig]] = {
    "nano": nano,
    "tiny": tiny,
    "small": small,
    "gpt2": gpt2,
    "large": large,
}
