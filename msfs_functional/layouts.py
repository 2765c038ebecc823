"""How each family of models is cut: its rules and its blocks."""

from torch.distributed.tensor import Shard

from msfs_functional.gathering import Layout

# Columns of the first product and rows of the second, so that between the two a rank needs nothing
# from the others (Shoeybi et al. 2019, section 3); tp cuts first, dp_shard what tp leaves.
_COLUMNS = {"tp": Shard(0), "dp_shard": Shard(0)}
_ROWS = {"tp": Shard(1), "dp_shard": Shard(0)}

TRANSFORMER = Layout(
    rules=[
        (r"(attention\.[qkv]|feed_forward\.up)\.(weight|bias)$", _COLUMNS),
        (r"(attention\.o|feed_forward\.down)\.weight$", _ROWS),
        (r"", {"dp_shard": Shard(0)}),
    ],
    # Keys and values of the memory are made outside of the decoder's layers.
    blocks=r"^encoder\.\d+$|^decoder\.\d+\.(self_attention|cross_attention|feed_forward)$",
    methods=("forward", "keys_values"),
)
