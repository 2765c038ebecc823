"""Loss of the next token, bits per byte and samples of a decoder."""

import dataclasses
from typing import Any

import pytest
import torch

from msfs_functional.generation import GREEDY
from msfs_functional.losses import cross_entropy
from msfs_functional.models.decoder import DecoderConfig, decoder
from msfs_functional.next_token import continuations, next_token_loss, validate
from msfs_functional.packing import batch_of, pack
from msfs_functional.synthetic.stories import stories
from msfs_functional.tokenizer import PAD, train_bpe, train_word_level

SMALL = DecoderConfig(300, width=8, depth=1, heads=2, max_length=64)


@pytest.mark.parametrize("softcap", [None, 0.02])
def test_loss_is_that_of_the_models_logits(softcap):
    """Also where the model caps its logits (Gemma 2)."""
    model = decoder(dataclasses.replace(SMALL, logit_softcap=softcap, dropout=0.5))
    params = model.init(0)
    batch = batch_of(pack([[2, *range(5, 40), 3], [2, 7, 9, 3]], 24), 0, 2)
    where: dict[str, Any] = {"segment_ids": batch["segments"], "positions": batch["positions"]}
    logits = model.apply(params, batch["tokens"], **where)
    total, count = cross_entropy(logits, batch["labels"], ignore_index=PAD)
    loss, metrics = next_token_loss(model, dropout=False)(params, batch, torch.tensor([0, 0]))
    torch.testing.assert_close(loss, total / count)
    assert int(metrics["weight"]) == int(count) == 39


def test_bits_per_byte_of_a_model_that_knows_nothing_are_those_of_equal_ids():
    """Every id costs log2 V bits, the end of the document included."""
    text = stories(0, 40)
    tokenizer = train_bpe(text, 300)
    model = decoder(SMALL)
    params = {name: torch.zeros(shape) for name, shape in model.shapes.items()}
    found = validate(next_token_loss(model), params, tokenizer, text, length=64, batch=6)
    tokens = sum(len(ids) + 1 for ids in tokenizer.encode(text))
    nats = torch.tensor(float(tokenizer.vocab_size)).log()
    torch.testing.assert_close(torch.tensor(found["valid/loss"]), nats, rtol=1e-5, atol=0)
    bits = tokens * float(nats) / 0.6931471805599453 / sum(len(t.encode()) for t in text)
    assert found["valid/bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_continuations_begin_with_their_prompts():
    text = stories(0, 40)
    tokenizer = train_word_level(text, 400)
    model = decoder(dataclasses.replace(SMALL, vocab=tokenizer.vocab_size))
    prompts = ["One cold day", ""]
    told = continuations(model, model.init(0), tokenizer, prompts, samples=2, sampling=GREEDY)
    assert len(told) == 4 and told[0] == told[1] and told[2] == told[3]
    assert told[0].startswith(prompts[0]) and not told[2].startswith(prompts[0])
