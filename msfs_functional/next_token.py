"""A decoder-only Transformer at its work: the loss of the next token, how good it is, its samples.

    loss_fn = next_token_loss(model)                       # for make_step, on one process or a mesh
    scores = validate(next_token_loss(model, dropout=False), params, tokenizer, documents, ...)
    texts = continuations(model, params, tokenizer, ["Once upon a time"], samples=3)

Dimension key: B rows, T tokens of a row.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msfs_functional import random
from msfs_functional.attention import Implementation
from msfs_functional.context_parallel import own_tokens, ring_attention
from msfs_functional.gathering import LossFn, Sharded, gathered
from msfs_functional.generation import Generator, Sampling, Settings
from msfs_functional.losses import linear_cross_entropy
from msfs_functional.meshes import axis_size
from msfs_functional.models.decoder import output_weight
from msfs_functional.models.decoder_generation import language_model
from msfs_functional.packing import in_batches, pack, total_loss
from msfs_functional.params import Functional, Params, cast
from msfs_functional.tokenizer import BOS, EOS, PAD, Tokenizer
from msfs_functional.vocabulary_parallel import sharded_linear_cross_entropy


def next_token_loss(
    model: Functional,
    *,
    dtype: torch.dtype = torch.float32,
    implementation: Implementation = "flash",
    dropout: bool = True,
) -> LossFn:
    """(params, batch, key) -> the mean cross-entropy of the next token [nats/token], its weight.

    No logits are held: the output matrix goes into the loss, over parts of the vocabulary where tp
    cuts it. Padding does not count.

    Args:
        model: a `models.decoder.decoder`, plain or `gathering.sharded`.
        dtype: of the computation on one process; a sharded model has its own.
        implementation: of attention.
        dropout: as the model's config says; False evaluates.

    Returns:
        A loss of batches as `packing` makes them: int64 (B, T) "tokens", "labels", "segments",
        "positions". On a mesh it takes this rank's rows, whole ones, and gives the mean over all
        ranks. Ranks of cp get the same rows, take their own tokens and attend around a ring.
    """
    config: Any = model.skeleton.config
    loss_of, attend = linear_cross_entropy, implementation
    if isinstance(model, Sharded):
        if axis_size(model.mesh, "cp") > 1:
            attend = ring_attention(model.mesh)
        loss_of = sharded_linear_cross_entropy(model.mesh, model.shapes["embedding.weight"][0])

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor | None):
        if isinstance(model, Sharded):  # which casts what it gathers
            batch = {name: own_tokens(x, model.mesh) for name, x in batch.items()}
        else:
            params = cast(params, dtype)
        states = model.apply(
            params,
            batch["tokens"],
            segment_ids=batch["segments"],
            positions=batch["positions"],
            key=key if dropout and config.dropout else None,
            implementation=attend,
            method="hidden",
        )
        total, count = loss_of(
            states,
            output_weight(params),
            batch["labels"],
            ignore_index=PAD,
            softcap=config.logit_softcap,
        )
        return total / count.clamp(min=1), {"weight": count}

    return gathered(loss_fn, model) if isinstance(model, Sharded) else loss_fn


def validate(
    loss_fn: LossFn,
    params: Params,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    length: int,
    batch: int,
    share: tuple[int, int] = (0, 1),
    device: str = "cpu",
) -> dict[str, float]:
    """{"valid/loss": nats/token, ends of documents included, "valid/bits_per_byte": of the text}.

    Args:
        length, batch: tokens of a packed row; rows of a batch, over all processes.
        share: (number, count) of the processes that take other rows.
    """
    rows = pack(tokenizer.encode(list(documents), bos=True, eos=True), length)
    nats, count = total_loss(loss_fn, params, in_batches(rows, batch, share, device))
    size = sum(len(document.encode()) for document in documents)
    return {"valid/loss": nats / count, "valid/bits_per_byte": nats / math.log(2) / size}


def continuations(
    model: Functional,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[str]:
    """Whole documents that begin with the prompts, `samples` of each; "" begins with nothing.

    They end with the model's own end of a document, or where its longest sequence does.
    """
    ids = tokenizer.encode(list(prompts), bos=True)
    ids = [each if text else [BOS] for each, text in zip(ids, prompts, strict=True)]
    generate = Generator(language_model(model, params, implementation="sdpa"), compile=False)
    sampling = sampling or Sampling()
    settings = Settings(generate.room(ids), sampling, samples=samples, stop_tokens=(EOS,))
    device = params["embedding.weight"].device
    with torch.no_grad():
        found = generate(ids, settings, key=random.key(seed, device=device))
    rows = zip(found.tokens.tolist(), found.lengths.tolist(), strict=True)
    return tokenizer.decode([*ids[n // samples], *row[:end]] for n, (row, end) in enumerate(rows))
