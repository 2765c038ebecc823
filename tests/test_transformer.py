"""The Transformer against torch.nn.Transformer and MarianMT, its masks, caches and options."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp, vmap
from transformers import MarianConfig, MarianMTModel

from msfs_functional import random
from msfs_functional.layers import lookup
from msfs_functional.models import transformer as tf
from msfs_functional.models.marian import from_marian
from msfs_functional.models.transformer import TransformerConfig, transformer

SMALL = {"vocab": 23, "width": 16, "depth": 2, "heads": 4, "hidden": 24, "max_length": 32}


def tokens(seed: int, *shape: int, vocab: int = 23) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab, shape, generator=generator)


def randomized(params: dict[str, torch.Tensor], seed: int = 7) -> dict[str, torch.Tensor]:
    """Parameters whose biases and norms are not at their neutral initial values."""
    keys = random.split(random.key(seed), len(params))
    return {
        name: value + 0.3 * random.normal(key, value.shape, dtype=value.dtype)
        for key, (name, value) in zip(keys, params.items(), strict=True)
    }


def torch_layer_names(name: str) -> str:
    """Our name of a parameter of torch.nn.Transformer, less what in_proj holds."""
    pairs = [
        ("encoder.layers.", "encoder."),
        ("decoder.layers.", "decoder."),
        ("encoder.norm.", "encoder_norm."),
        ("decoder.norm.", "decoder_norm."),
        ("self_attn.out_proj", "self_attention.o"),
        ("multihead_attn.out_proj", "cross_attention.o"),
        ("self_attn", "self_attention"),
        ("multihead_attn", "cross_attention"),
        ("linear1", "feed_forward.up"),
        ("linear2", "feed_forward.down"),
        ("norm1", "self_attention_norm"),
    ]
    for old, new in pairs:
        name = name.replace(old, new)
    last = (name.startswith("encoder") and ".norm2" in name) or ".norm3" in name
    name = name.replace(".norm3", ".norm2")
    return name.replace(".norm2", ".feed_forward_norm" if last else ".cross_attention_norm")


def from_torch(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    params = {}
    for name, value in weights.items():
        ours = torch_layer_names(name)
        if "in_proj" in ours:
            stem, kind = ours.rsplit(".in_proj_", 1)
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                params[f"{stem}.{part}.{kind}"] = chunk
        else:
            params[ours] = value
    return params


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_states_equal_torch_nn_transformer(norm, bias):
    torch.manual_seed(0)
    theirs = nn.Transformer(
        16, 4, 2, 3, 24, 0.0, norm_first=norm == "pre", bias=bias, batch_first=True
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.25)
    options = {"decoder_depth": 3, "final_norm": True, "norm": norm, "bias": bias}
    model = transformer(TransformerConfig(**{**SMALL, **options}))
    params = model.init(0) | from_torch(dict(theirs.state_dict()))
    source, target = tokens(0, 3, 7), tokens(1, 3, 5)
    lengths = torch.tensor([7, 4, 1])
    padding = torch.arange(7) >= lengths[:, None]
    x, y = (
        params["embedding.weight"][ids] * math.sqrt(16)
        + tf.sinusoidal_positions(torch.arange(ids.shape[1]), 16)
        for ids in (source, target)
    )
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    expected = theirs(
        x, y, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding
    )
    for implementation in ("reference", "sdpa"):
        states = model.apply(
            params,
            source,
            target,
            source_lengths=lengths,
            method="hidden",
            implementation=implementation,
        )
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


def marian(**options) -> MarianMTModel:
    defaults = {
        "vocab_size": 23,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 64,
        "scale_embedding": True,
        "activation_function": "swish",
        "pad_token_id": 0,
        "eos_token_id": 2,
        "forced_eos_token_id": 2,
        "decoder_start_token_id": 0,
    }
    torch.manual_seed(0)
    model = MarianMTModel(MarianConfig(**{**defaults, **options})).eval()
    for name, parameter in model.named_parameters():
        if "norm.weight" in name:
            nn.init.normal_(parameter, 1.0, 0.2)
        elif "embed_positions" not in name:
            nn.init.normal_(parameter, std=0.1 if "bias" in name else 0.25)
    nn.init.normal_(model.final_logits_bias, std=0.1)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_function": "relu", "scale_embedding": False},
        {"activation_function": "gelu", "encoder_layers": 1, "d_model": 24},
        {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 31},
        {"tie_word_embeddings": False, "share_encoder_decoder_embeddings": False},
    ],
)
@torch.no_grad()
def test_logits_equal_marian(options):
    theirs = marian(**options)
    config, params = from_marian(theirs.config.to_dict(), theirs.state_dict())
    model = transformer(config)
    assert set(params) == set(model.shapes)
    source, target = tokens(0, 4, 9), tokens(1, 4, 6)
    lengths = torch.tensor([9, 5, 1, 7])
    mask = (torch.arange(9) < lengths[:, None]).long()
    expected = theirs(source, attention_mask=mask, decoder_input_ids=target).logits
    for implementation in ("reference", "sdpa"):
        logits = model.apply(
            params, source, target, source_lengths=lengths, implementation=implementation
        )
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def example(seed: int = 0, dtype=torch.float64, **options):
    """(model, params, source, lengths, target) of a small model."""
    config = TransformerConfig(**{**SMALL, "dropout": 0.2, **options})
    model = transformer(config)
    params = randomized(model.init(seed, dtype=dtype))
    return model, params, tokens(0, 3, 7), torch.tensor([7, 4, 1]), tokens(1, 3, 5)


@pytest.mark.parametrize("implementation", ["reference", "sdpa", "flash"])
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_decode_equals_full_forward(implementation, beams):
    """In pieces of 2, 1 and 2 tokens, while hypotheses of a sentence change places."""
    model, params, source, lengths, target = example(dropout=0.0)
    target = tokens(2, 3, beams, 5)
    full = model.apply(
        params,
        source.repeat_interleave(beams, 0),
        target.flatten(0, 1),
        source_lengths=lengths.repeat_interleave(beams),
        implementation="reference",
    )
    cache = model.apply(params, source, lengths, 5, beams, method="start")
    order = torch.arange(3 * beams)  # which hypothesis each row of the cache continues
    swap = order.reshape(3, beams).roll(1, 1).flatten()
    for start, end in ((0, 2), (2, 3), (3, 5)):
        logits, cache = model.apply(
            params,
            target.flatten(0, 1)[order, start:end],
            cache,
            torch.tensor(start),
            method="decode",
            implementation=implementation,
        )
        torch.testing.assert_close(logits, full[order, start:end])
        cache, order = tf.reorder_cache(cache, swap), order[swap]


@pytest.mark.parametrize("implementation", ["reference", "flash"])
def test_padding_has_no_effect(implementation):
    model, params, source, lengths, target = example()
    arguments = {"source_lengths": lengths, "implementation": implementation}
    before = model.apply(params, source, target, **arguments)
    changed = torch.where(torch.arange(7) >= lengths[:, None], 5, source)
    assert not torch.equal(changed, source)
    torch.testing.assert_close(model.apply(params, changed, target, **arguments), before)
    wider = torch.nn.functional.pad(source, (0, 4))
    torch.testing.assert_close(model.apply(params, wider, target, **arguments), before)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_rows_of_length_zero_are_finite_and_teach_nothing(norm):
    model, params, source, lengths, target = example(norm=norm)
    params = {name: value.requires_grad_() for name, value in params.items()}

    def grads(source, target, lengths, target_lengths, rows):
        logits = model.apply(
            params, source, target, source_lengths=lengths, target_lengths=target_lengths
        )
        assert logits.isfinite().all()
        return torch.autograd.grad(logits[:rows].square().sum(), list(params.values()))

    alone = grads(source, target, lengths, torch.tensor([5, 3, 2]), 3)
    empty = torch.zeros(2, dtype=torch.int64)
    padded = grads(
        torch.cat([source, torch.zeros(2, 7, dtype=torch.int64)]),
        torch.cat([target, torch.zeros(2, 5, dtype=torch.int64)]),
        torch.cat([lengths, empty]),
        torch.cat([torch.tensor([5, 3, 2]), empty]),
        3,
    )
    for ours, expected in zip(padded, alone, strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_future_is_hidden_and_the_source_is_seen():
    model, params, source, lengths, target = example()
    before = model.apply(params, source, target, source_lengths=lengths)
    later = target.clone()
    later[:, 3] = later[:, 3] % 22 + 1
    after = model.apply(params, source, later, source_lengths=lengths)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3:] != before[:, 3:]).any(-1).all()
    other = model.apply(params, source % 22 + 1, target, source_lengths=lengths)
    assert (other != before).any(-1).all()


def test_dropout_follows_its_key_in_every_implementation():
    model, params, source, lengths, target = example(attention_dropout=0.2, hidden_dropout=0.2)
    run = {
        (seed, name): model.apply(
            params,
            source,
            target,
            source_lengths=lengths,
            key=None if seed is None else random.key(seed),
            implementation=name,
        )
        for seed in (None, 1, 2)
        for name in ("reference", "flash")
    }
    for seed in (None, 1, 2):
        torch.testing.assert_close(run[seed, "flash"], run[seed, "reference"])
    assert not torch.allclose(run[1, "flash"], run[2, "flash"])
    assert not torch.allclose(run[1, "flash"], run[None, "flash"])


def test_attention_maps_are_probabilities_of_the_visible():
    model, params, source, lengths, target = example()
    maps = model.apply(params, source, target, source_lengths=lengths, method="attention_maps")
    assert maps["encoder"].shape == (2, 3, 4, 7, 7)
    assert maps["decoder"].shape == (2, 3, 4, 5, 5)
    assert maps["cross"].shape == (2, 3, 4, 5, 7)
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (maps["cross"][:, 1, ..., 4:] == 0).all()
    assert (maps["decoder"].triu(1) == 0).all()


@pytest.mark.parametrize("tie", ["all", "decoder", "none"])
def test_hidden_states_and_output_weight_make_the_logits(tie):
    model, params, source, lengths, target = example(tie=tie)
    states = model.apply(params, source, target, source_lengths=lengths, method="hidden")
    logits = model.apply(params, source, target, source_lengths=lengths)
    torch.testing.assert_close(states @ tf.output_weight(params).T, logits)
    embeddings = {name for name in model.shapes if "embedding" in name or "output" in name}
    assert len(embeddings) == {"all": 1, "decoder": 2, "none": 3}[tie]


def test_a_call_leaves_the_skeleton_as_it_was():
    model, params, source, _, target = example()
    before = dict(model.skeleton.named_parameters(remove_duplicate=False))
    model.apply(params, source, target)
    after = dict(model.skeleton.named_parameters(remove_duplicate=False))
    assert all(after[name] is value for name, value in before.items())


def test_positions_by_hand():
    table = tf.sinusoidal_positions(torch.tensor([0, 3]), 4, dtype=torch.float64)
    expected = [[0, 1, 0, 1], [math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)]]
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64))
    halves = tf.sinusoidal_positions(torch.tensor([3]), 4, layout="halves", dtype=torch.float64)
    torch.testing.assert_close(halves[0], table[1][[0, 2, 1, 3]])


@pytest.mark.parametrize(
    ("preset", "vocab", "millions"),
    [("tiny", 10_000, 2.6), ("base", 37_000, 63), ("big", 37_000, 214)],
)
def test_presets_have_the_papers_sizes(preset, vocab, millions):
    sizes = transformer(tf.PRESETS[preset](vocab)).shapes.values()
    assert sum(size.numel() for size in sizes) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads"),
        ({"depth": 0}, "depth"),
        ({"hidden": -1}, "hidden"),
        ({"width": 15, "heads": 3}, "even"),
        ({"dropout": 1.0}, "dropout"),
        ({"target_vocab": 30}, "target_vocab"),
        ({"activation": "tanh"}, "activation"),
    ],
)
def test_bad_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        transformer(TransformerConfig(**{**SMALL, **options}))


def test_sequences_beyond_max_length_are_refused():
    model, params, source, _, target = example(max_length=6)
    with pytest.raises(ValueError, match="max_length"):
        model.apply(params, source, target)
    with pytest.raises(ValueError, match="max_length"):
        model.apply(params, source[:, :4], None, 7, method="start")


@pytest.mark.parametrize("dims", [(0, None), (0, 0), (None, 0)])
def test_rows_of_members_matrices_are_those_of_each(dims):
    """Values and derivatives of first and second order, of matrices that lie apart in memory."""
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(3, 100, generator=generator, dtype=torch.float64)
    tokens = torch.randint(7, (3, 2, 5) if dims[1] == 0 else (2, 5), generator=generator)

    def loss(rows_of, weight, ids):
        return (rows_of(weight, ids).sin() * torch.arange(4.0)).sum()

    def results(rows_of) -> list[Tensor]:
        whole = memory.clone().requires_grad_()
        weight = whole[:, 8:36].view(3, 7, 4)
        args = (weight if dims[0] == 0 else weight[0], tokens)
        fn = functools.partial(loss, rows_of)
        values = vmap(fn, in_dims=dims)(*args)
        first = torch.autograd.grad(values.sum(), whole, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), whole)[0]
        each = vmap(torch.func.grad(fn), in_dims=dims)(*args)
        product = vmap(
            lambda w, ids: torch.func.jvp(torch.func.grad(lambda w: fn(w, ids)), (w,), (w,))[1],
            in_dims=dims,
        )(*args)
        return [values, first, second, each, product]

    for ours, theirs in zip(
        results(lookup), results(lambda w, ids: F.embedding(ids, w)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("how", ["eager", "compiled", "forward mode"])
@pytest.mark.parametrize("token", [-1, 7])
def test_a_token_beyond_a_member_s_matrix_is_refused_and_not_looked_up_in_the_next(token, how):
    weights, tokens = torch.randn(3, 7, 4), torch.zeros(3, 2, dtype=torch.int64)
    tokens[1, 0] = token  # of the member in the middle: its neighbours' rows lie around it
    members = vmap(lookup)
    if how == "compiled":
        members = torch.compile(members, backend="aot_eager")  # "eager": see test_embeddings
    if how == "forward mode":
        members = vmap(lambda w, ids: jvp(lambda w: lookup(w, ids), (w,), (w,))[1])
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        members(weights, tokens)


def test_rows_of_a_matrix_compile_whole():
    weight, tokens = torch.randn(7, 4), torch.tensor([[1, 6]])
    compiled = torch.compile(lookup, fullgraph=True, backend="eager")
    assert torch.equal(compiled(weight, tokens), weight[tokens])
