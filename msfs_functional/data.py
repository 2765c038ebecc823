"""Pairs of texts for training: read, tokenised once, batched.

splits = load_pairs("opus_books", config="en-it")
tokenizer = train_bpe([*splits.train["source"], *splits.train["target"]], 8000)
batches = TokenBatches(*encode_pairs(splits.train, tokenizer), tokens=8192)
batch = next(batches)
"""

import hashlib
import sys
from pathlib import Path

import datasets
import datasets.config
import numpy as np

from msfs_functional.batches import Prefetch, Ragged, TokenBatches
from msfs_functional.corpora import Splits, load_pairs
from msfs_functional.tokenizer import Tokenizer

__all__ = ["Prefetch", "Ragged", "Splits", "TokenBatches", "encode_pairs", "load_pairs"]


def _ragged(column: datasets.Dataset, name: str) -> Ragged:
    """The lists of a column as one flat array, straight from Arrow's buffers."""
    lists = column.with_format("arrow")[:][name].combine_chunks()
    offsets = lists.offsets.to_numpy()
    values = lists.values.to_numpy(zero_copy_only=False)
    return Ragged(values[offsets[0] : offsets[-1]], offsets.astype(np.int64) - offsets[0])


def encode_pairs(
    pairs: datasets.Dataset,
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer | None = None,
    *,
    cache_dir: str | Path | None = None,
) -> tuple[Ragged, Ragged]:
    """Ids of both columns: source ... EOS, and BOS target ... EOS; computed once and cached.

    The cache is an Arrow file named after the content of the pairs and of the tokenizers: the same
    input finds it again in every process, any other input does not.

    Args:
        pairs: columns "source" and "target", as `load_pairs` gives them.
        source_tokenizer, target_tokenizer: the second is the first if it is left out.
        cache_dir: folder of the cached file; None means a folder in the one of `datasets`.
    """
    target_tokenizer = target_tokenizer or source_tokenizer
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "msfs_functional")
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for part in (pairs._fingerprint, source_tokenizer.to_json(), target_tokenizer.to_json()):
        digest.update(part.encode() + b"\0")
    fingerprint = digest.hexdigest()[:16]

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {
            "source": source_tokenizer.encode(rows["source"], eos=True),
            "target": target_tokenizer.encode(rows["target"], bos=True, eos=True),
        }

    ids = datasets.List(datasets.Value("int32"))
    quiet = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        encoded = pairs.map(
            encode,
            batched=True,
            batch_size=10_000,
            features=datasets.Features({"source": ids, "target": ids}),
            cache_file_name=str(folder / f"pairs_{fingerprint}.arrow"),
            new_fingerprint=fingerprint,
        )
    finally:
        if quiet:
            datasets.enable_progress_bars()
    return _ragged(encoded, "source"), _ragged(encoded, "target")
