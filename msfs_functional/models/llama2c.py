"""Models in the single-file format of karpathy/llama2.c, version 0, and its tokenizer."""

import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msfs_functional.models.decoder import DecoderConfig
from msfs_functional.params import Params


def read_model(path: str | Path) -> tuple[DecoderConfig, Params]:
    """Configuration and float32 parameters: seven int32, then the matrices one after another.

    There pairs (2c, 2c + 1) of a head rotate together, here (c, c + K/2): the rows of q and k are
    put in that order, which changes no product of a query and a key.

    Raises:
        ValueError: a file of another size than its header says.
    """
    data = Path(path).read_bytes()
    if len(data) < 28:
        raise ValueError(
            f"{path} has {len(data)} bytes, too few for the header of a llama2.c model"
        )
    width, hidden, depth, heads, kv_heads, vocab, length = struct.unpack("<7i", data[:28])
    tied, vocab = vocab > 0, abs(vocab)
    config = DecoderConfig(
        vocab,
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        max_length=length,
        tied=tied,
    )
    K, rows = width // heads, width // heads * kv_heads
    values = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy())
    sizes = [vocab * width, depth * width, 2 * depth * width**2, 2 * depth * rows * width]
    sizes += [depth * width, 3 * depth * width * hidden, width, length * K, 0]
    total = sum(sizes) + (0 if tied else vocab * width)
    if len(values) != total:
        raise ValueError(f"{path} holds {len(values)} numbers, its header says {total}")
    taken = 0

    def take(*shape: int) -> Tensor:
        nonlocal taken
        size = int(np.prod(shape))
        taken += size
        return values[taken - size : taken].view(shape)

    def halves(x: Tensor) -> Tensor:
        return x.view(-1, K // 2, 2, width).transpose(1, 2).reshape(-1, width)

    params = {"embedding.weight": take(vocab, width)}
    stacks = {
        "attention_norm": (width,),
        "attention.q": (width, width),
        "attention.k": (rows, width),
        "attention.v": (rows, width),
        "attention.o": (width, width),
        "feed_forward_norm": (width,),
        "feed_forward.gate": (hidden, width),
        "feed_forward.down": (width, hidden),
        "feed_forward.up": (hidden, width),
    }
    for name, shape in stacks.items():
        for i, value in enumerate(take(depth, *shape)):
            turned = name in ("attention.q", "attention.k")
            params[f"blocks.{i}.{name}.weight"] = halves(value) if turned else value
    params["norm.weight"] = take(width)
    take(length, K)  # tables of cosines and sines
    if not tied:
        params["output.weight"] = take(vocab, width)
    return config, params


def read_tokens(path: str | Path) -> list[bytes]:
    """What each id spells, from a tokenizer of llama2.c: int32, then (float, int32, bytes) each.

    A token <0x0A> spells that byte.
    """
    data, at, tokens = Path(path).read_bytes(), 4, []
    while at < len(data):
        (size,) = struct.unpack_from("<i", data, at + 4)
        piece = data[at + 8 : at + 8 + size]
        byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", piece)
        tokens.append(bytes([int(byte[1], 16)]) if byte else piece)
        at += 8 + size
    return tokens
