"""How each family of models is cut: its rules, its blocks, its tensor parallelism.

tp takes the columns of a layer's first matrices and the rows of its last, and the decoder's
vocabulary; dp_shard cuts the first dim of what tp leaves.
"""

from dataclasses import replace

from torch.distributed.tensor import Shard

from msfs_functional.gathering import Layout
from msfs_functional.sharding import Cuts
from msfs_functional.tensor_parallel import (
    split_decoder,
    split_decoder_and_tokens,
    split_transformer,
)

COLUMNS: Cuts = {"tp": Shard(0), "dp_shard": Shard(0)}
ROWS: Cuts = {"tp": Shard(1), "dp_shard": Shard(0)}
WHOLE: Cuts = {"dp_shard": Shard(0)}

TRANSFORMER = Layout(
    rules=[
        (r"(attention\.[qkv]|feed_forward\.up)\.(weight|bias)$", COLUMNS),
        (r"(attention\.o|feed_forward\.down)\.weight$", ROWS),
        (r"", WHOLE),
    ],
    # Keys and values of the memory are made outside of the decoder's layers.
    blocks=r"^encoder\.\d+$|^decoder\.\d+\.(self_attention|cross_attention|feed_forward)$",
    methods=("forward", "keys_values"),
    divided=("heads",),
    split=split_transformer,
)

DECODER = Layout(
    rules=[
        (r"(attention\.(q|k|v|qkv)|feed_forward\.(up|gate|gate_up))\.(weight|bias)$", COLUMNS),
        (r"(attention\.o|feed_forward\.down)\.weight$", ROWS),
        (r"^(embedding|output)\.weight$", COLUMNS),
        (r"", WHOLE),
    ],
    blocks=r"^blocks\.\d+$",
    inside=r"attention\.[qk]_norm",
    divided=("heads", "kv_heads"),
    split=split_decoder,
)

# The same with sequence parallelism: tp ranks hold parts of the tokens between the matrices.
DECODER_BY_TOKENS = replace(
    DECODER, inside=r"norm|\.(o|down)\.bias$", split=split_decoder_and_tokens
)

# Towers and what is made of them (ViT, CLIP, vision-language models): cut over data ranks only.
TOWERS = Layout(rules=[(r"", WHOLE)], blocks=r"(^|\.)blocks\.\d+$")
