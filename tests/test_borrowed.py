"""A published decoder and tokenizer keep their meaning under this library's ids."""

import json

import pytest
import tokenizers
import torch

from msfs_functional.borrowed import load
from msfs_functional.models import pretrained
from msfs_functional.models.decoder import decoder, tiny
from msfs_functional.tokenizer import EOS, PAD

WORDS = ["<unk>", "the", "a", "cat", "sat", "<s>", "</s>", "<pad>", "dog"]


def folder(path, words=WORDS, **special):
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    config = tiny(len(words), width=16, depth=1, heads=2, kv_heads=2, hidden=24, max_length=32)
    params = decoder(config).init(0)
    pretrained.save(path, config, params, tokenizer=backend.to_str(), family="llama")
    (path / "tokenizer_config.json").write_text(json.dumps(special))
    return config, params


SPECIAL = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "pad_token": "<pad>"}


def test_logits_of_a_borrowed_decoder_are_the_published_ones(tmp_path):
    config, params = folder(tmp_path, **SPECIAL)
    local = load(tmp_path)
    (ids,) = local.tokenizer.encode(["the cat sat"], bos=True, eos=True)
    assert ids[-1] == EOS and PAD not in ids
    assert local.tokenizer.decode([[*ids, PAD, PAD]]) == ["the cat sat"]
    theirs = torch.tensor([[5, 1, 3, 4, 6]])
    expected = decoder(config).apply(params, theirs)
    found = decoder(local.config).apply(local.params, torch.tensor([ids]))
    torch.testing.assert_close(found, expected[..., local.tokenizer.theirs])
    assert [local.tokenizer.theirs[i] for i in ids] == theirs[0].tolist()


def test_a_tokenizer_without_pad_or_end_token_is_refused_and_told_how_to_go_on(tmp_path):
    folder(tmp_path, **{**SPECIAL, "pad_token": None})
    with pytest.raises(ValueError, match=r"pad token none: name one .* --model\.pad"):
        load(tmp_path)
    with pytest.raises(ValueError, match="'<filler>', which it does not know"):
        load(tmp_path, pad="<filler>")
    assert load(tmp_path, pad="dog").tokenizer.theirs[PAD] == WORDS.index("dog")
    folder(tmp_path, **{**SPECIAL, "pad_token": "</s>"})
    with pytest.raises(ValueError, match="its end token, whose label would be lost"):
        load(tmp_path)
    folder(tmp_path, **{**SPECIAL, "eos_token": None})
    with pytest.raises(ValueError, match="has no end token, so no answer would end"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load(tmp_path)
