"""Searches against exhaustive search, against transformers, and against the distributions meant."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from msfs_functional import decoding, random
from msfs_functional.decoding import Hypotheses
from msfs_functional.models import transformer as tf
from msfs_functional.models.marian import from_marian
from msfs_functional.params import stack

BOS, EOS, PAD = 1, 2, 0
LIMITS = {"bos": BOS, "eos": EOS}


def table_model(seed: int, vocab: int, length: int, sharpness: float = 1.0):
    """A "model" whose logits are a random table of (position, all tokens so far).

    Its cache holds the tokens of each row, so a row that is not reordered with its hypothesis
    gives other logits: the searches are tested through it.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(length, length * vocab, vocab, generator=generator) * sharpness

    def step_fn(tokens, cache, position):
        cache = cache.index_copy(1, position[None], tokens[:, None])
        seen = torch.nn.functional.one_hot(cache, vocab).float()
        seen = seen * (torch.arange(length) <= position)[:, None]
        mixed = torch.einsum(
            "nf,fv->nv", seen.flatten(1), weights.index_select(0, position[None])[0]
        )
        return mixed / math.sqrt(length), cache

    return step_fn


def empty(rows: int, length: int) -> torch.Tensor:
    return torch.zeros(rows, length, dtype=torch.int64)


def log_probability(step_fn, sequence, length: int) -> float:
    """Sum of the sequence's token log-probabilities, a token at a time."""
    cache, total, last = empty(1, length), 0.0, BOS
    for position, token in enumerate(sequence):
        logits, cache = step_fn(torch.tensor([last]), cache, torch.tensor(position))
        total += logits.log_softmax(-1)[0, token].item()
        last = token
    return total


def every_sequence(vocab: int, length: int):
    """All that can be made: ended by EOS, or cut at `length`."""
    for n in range(1, length + 1):
        for body in itertools.product([t for t in range(vocab) if t != EOS], repeat=n - 1):
            for last in range(vocab) if n == length else [EOS]:
                yield (*body, last)


@pytest.mark.parametrize(("norm", "penalty"), [("power", 0.0), ("power", 1.0), ("gnmt", 0.6)])
def test_beam_search_equals_exhaustive_search(norm, penalty):
    vocab, length = 4, 4
    step_fn = table_model(3, vocab, length)
    divide = {"power": lambda n: n**penalty, "gnmt": lambda n: ((5 + n) / 6) ** penalty}[norm]
    scored = [
        (log_probability(step_fn, s, length) / divide(len(s)), s)
        for s in every_sequence(vocab, length)
    ]
    scored.sort(reverse=True)
    beams = 64  # as many as there are prefixes: nothing is ever dropped
    found = decoding.beam_search(
        step_fn,
        empty(beams, length),
        batch=1,
        beams=beams,
        max_length=length,
        length_norm=norm,
        length_penalty=penalty,
        early_stopping="never",
        n_best=10,
        **LIMITS,
    )
    for (score, sequence), tokens, n, ours in zip(
        scored, found.tokens[0], found.lengths[0], found.scores[0], strict=False
    ):
        assert tuple(tokens[:n].tolist()) == sequence and (tokens[n:] == PAD).all()
        assert ours.item() == pytest.approx(score, abs=1e-5)


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([True, False, "never"]))
def test_scores_are_the_models_own(seed, beams, early_stopping):
    """Every hypothesis rescored alone has its score: rows and caches never mix."""
    vocab, length, batch = 7, 6, 2
    step_fn = table_model(seed, vocab, length, sharpness=3.0)
    found = decoding.beam_search(
        step_fn,
        empty(batch * beams, length),
        batch=batch,
        beams=beams,
        max_length=length,
        early_stopping=early_stopping,
        n_best=beams,
        **LIMITS,
    )
    assert (found.scores.diff(dim=1) <= 0).all()
    for tokens, n, score in zip(
        found.tokens.flatten(0, 1), found.lengths.flatten(), found.scores.flatten(), strict=True
    ):
        if n > 0:
            alone = log_probability(step_fn, tokens[:n].tolist(), length) / n.item()
            assert score.item() == pytest.approx(alone, abs=1e-5)


def test_one_beam_is_greedy():
    step_fn = table_model(5, 9, 6, sharpness=2.0)
    arguments = {"batch": 3, "max_length": 6, "bos": torch.tensor([1, 3, 5]), "eos": EOS}
    greedy = decoding.greedy(step_fn, empty(3, 6), **arguments)
    beam = decoding.beam_search(
        step_fn, empty(3, 6), beams=1, length_penalty=0.0, early_stopping=True, **arguments
    )
    torch.testing.assert_close(Hypotheses(*(x[:, 0] for x in beam)), greedy)


def test_more_beams_find_no_worse():
    step_fn = table_model(11, 30, 5)
    scores = [
        decoding.beam_search(
            step_fn,
            empty(beams, 5),
            batch=1,
            beams=beams,
            max_length=5,
            length_penalty=0.0,
            early_stopping="never",
            **LIMITS,
        ).scores.item()
        for beams in (1, 4, 400)
    ]
    assert scores[0] <= scores[1] <= scores[2]


def test_banned_tokens_never_appear_and_eos_can_be_forced():
    step_fn = table_model(2, 12, 6)
    banned = [t for t in range(12) if t not in (4, 7)]
    found = decoding.beam_search(
        step_fn,
        empty(6, 6),
        batch=2,
        beams=3,
        max_length=6,
        banned=banned,
        force_eos=True,
        n_best=3,
        **LIMITS,
    )
    assert (found.lengths == 6).all() and (found.tokens[..., -1] == EOS).all()
    assert torch.isin(found.tokens[..., :-1], torch.tensor([4, 7])).all()
    drawn = decoding.sample(
        step_fn, empty(50, 6), random.key(0), batch=50, max_length=6, banned=banned, **LIMITS
    )
    assert torch.isin(drawn.tokens, torch.tensor([4, 7])).all()


def test_rows_that_ended_are_padded_and_scored_up_to_eos():
    step_fn = table_model(8, 5, 8)
    found = decoding.sample(step_fn, empty(64, 8), random.key(3), batch=64, max_length=8, **LIMITS)
    assert len(set(found.lengths.tolist())) > 3
    for tokens, n, score in zip(*found, strict=True):
        ended = tokens.tolist()[:n]
        assert (tokens[n:] == PAD).all() and EOS not in ended[:-1]
        assert ended[-1] == EOS or n == 8
        assert score.item() == pytest.approx(log_probability(step_fn, ended, 8), abs=1e-4)


def fixed_model(logits: torch.Tensor):
    return lambda tokens, cache, position: (logits.expand(tokens.shape[0], -1), cache)


def frequencies(logits: torch.Tensor, n: int = 40_000, **options) -> torch.Tensor:
    found = decoding.sample(
        fixed_model(logits),
        empty(n, 1),
        random.key(9),
        batch=n,
        max_length=1,
        bos=0,
        eos=-1,
        **options,
    )
    return found.tokens[:, 0].bincount(minlength=logits.shape[0]) / n


LOGITS = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.06, 0.04]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.3, 0.25, 0.2, 0.15, 0.06, 0.04]),
        ({"temperature": 0.5}, [0.09, 0.0625, 0.04, 0.0225, 0.0036, 0.0016]),
        ({"top_k": 2}, [0.3, 0.25, 0, 0, 0, 0]),
        ({"top_p": 0.6}, [0.3, 0.25, 0.2, 0, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0, 0]),
        ({"min_p": 0.45}, [0.3, 0.25, 0.2, 0.15, 0, 0]),
        ({"top_k": 5, "top_p": 0.8, "min_p": 0.6}, [0.3, 0.25, 0.2, 0, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0, 0]),
    ],
)
def test_samples_follow_the_distribution(options, expected):
    probs = torch.tensor(expected, dtype=torch.float64)
    probs = probs / probs.sum()
    n = 40_000
    observed = frequencies(LOGITS, n, **options)
    assert (observed[probs == 0] == 0).all()
    deviation = (observed - probs).abs() / (probs * (1 - probs) / n).sqrt().clamp(min=1e-9)
    assert (deviation < 4.5)[(probs > 0) & (probs < 1)].all()


@given(st.integers(0, 10**6))
def test_filters_equal_transformers(seed):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) * 3
    pairs = [
        (decoding.keep_top_k(logits, 7), transformers.TopKLogitsWarper(7)),
        (decoding.keep_top_p(logits, 0.7), transformers.TopPLogitsWarper(0.7)),
        (decoding.keep_min_p(logits, 0.2), transformers.MinPLogitsWarper(0.2)),
    ]
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs(None, logits.clone()))


def test_the_same_key_draws_the_same_tokens():
    step_fn = table_model(8, 50, 6)
    draw = functools.partial(decoding.sample, step_fn, empty(4, 6), batch=4, max_length=6, **LIMITS)
    assert torch.equal(draw(random.key(1)).tokens, draw(random.key(1)).tokens)
    assert not torch.equal(draw(random.key(1)).tokens, draw(random.key(2)).tokens)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([(5, 3), (1500, 4), (4100, 10), (3000, 1)]))
def test_chunked_top_k_equals_topk(seed, sizes):
    vocab, k = sizes
    x = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed))
    x[0, 2:] = -math.inf  # fewer finite ones than k
    values, index = decoding._top_k(x, k)
    assert torch.equal(values, x.topk(k).values)
    assert ((index >= 0) & (index < vocab)).all() and torch.equal(x.gather(1, index), values)


# Compiled searches.


def equal_and_compiled_once(search: Callable[..., decoding.Hypotheses]) -> None:
    runner = decoding.Compiled(check_every=2)
    eager = search(max_length=7, **LIMITS)
    for _ in range(2):
        compiled = search(max_length=7, **LIMITS, runner=runner)
        torch.testing.assert_close(compiled, eager)
    assert len(runner._kept) == 1


def test_compiled_beam_search_equals_eager_and_is_compiled_once():
    step_fn = table_model(4, 9, 7, sharpness=2.0)
    options: dict[str, Any] = {"batch": 2, "beams": 3, "n_best": 3}
    equal_and_compiled_once(
        functools.partial(decoding.beam_search, step_fn, empty(6, 7), **options)
    )


def test_traced_sampling_equals_eager_and_is_traced_once(compile_with):
    compile_with("aot_eager")
    step_fn = table_model(4, 9, 7, sharpness=2.0)
    key = random.key(1)
    equal_and_compiled_once(
        functools.partial(decoding.sample, step_fn, empty(2, 7), key, batch=2, top_p=0.9)
    )


# The Transformer in a search.


def small_marian(seed: int, vocab: int = 120) -> transformers.MarianMTModel:
    torch.manual_seed(seed)
    config = transformers.MarianConfig(
        vocab_size=vocab, d_model=16, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_position_embeddings=64, scale_embedding=True,
        activation_function="swish", pad_token_id=PAD, eos_token_id=EOS, forced_eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )  # fmt: skip
    model = transformers.MarianMTModel(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and "embed_positions" not in name:
            nn.init.normal_(parameter, std=0.1 if "bias" in name else 0.5)
    nn.init.normal_(model.final_logits_bias, std=0.5)
    model.generation_config.bad_words_ids = [[PAD]]
    return model


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_hypotheses_equal_marian_generate(early_stopping, penalty):
    marian, new = small_marian(seed=1), 10
    config, params = from_marian(marian.config.to_dict(), marian.state_dict())
    model = tf.transformer(config)
    source = torch.randint(3, 120, (4, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 5, 1, 7])
    with torch.no_grad():
        expected = marian.generate(
            source,
            attention_mask=(torch.arange(9) < lengths[:, None]).long(),
            num_beams=5,
            num_return_sequences=3,
            max_new_tokens=new,
            early_stopping=early_stopping,
            length_penalty=penalty,
            return_dict_in_generate=True,
            output_scores=True,
        )
        memory = model.apply(params, source, lengths, method="encode")
        cache = model.apply(params, memory, lengths, new, 5, method="init_cache")
    found = decoding.beam_search(
        functools.partial(tf.decode_step(model), params),
        cache,
        batch=4,
        beams=5,
        max_length=new,
        bos=PAD,
        eos=EOS,
        length_penalty=penalty,
        early_stopping=early_stopping,
        force_eos=True,
        banned=(PAD,),
        n_best=3,
        reorder_fn=tf.reorder_cache,
    )
    theirs = expected.sequences[:, 1:]
    tokens, lengths = found.tokens.flatten(0, 1)[:, : theirs.shape[1]], found.lengths.flatten()
    inside = torch.arange(theirs.shape[1]) < lengths[:, None]  # they pad with EOS or PAD
    assert torch.equal(tokens * inside, theirs * inside)
    assert (~inside[:, -1]).any() or lengths.max() == theirs.shape[1]
    torch.testing.assert_close(
        found.scores.flatten(), expected.sequences_scores, atol=1e-5, rtol=1e-5
    )


def two_models():
    config = tf.TransformerConfig(17, width=8, depth=1, heads=2, hidden=16, max_length=16)
    model = tf.transformer(config)
    members = [model.init(seed) for seed in (1, 2)]
    source = torch.randint(3, 17, (2, 5), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([5, 3])

    def cache(params, beams):
        memory = model.apply(params, source, lengths, method="encode")
        return model.apply(params, memory, lengths, 6, beams, method="init_cache")

    return model, members, cache


def test_an_ensemble_averages_probabilities():
    model, members, cache = two_models()
    stacked = stack(members)
    step = tf.decode_step(model)
    caches = [cache(member, 1) for member in members]
    tokens, zero = torch.tensor([BOS, 5]), torch.tensor(0)
    alone = [step(p, tokens, c, zero)[0].softmax(-1) for p, c in zip(members, caches, strict=True)]
    many = torch.vmap(cache, in_dims=(0, None))(stacked, 1)
    logits, _ = decoding.ensemble_step(step, stacked)(tokens, many, zero)
    torch.testing.assert_close(logits.exp(), torch.stack(alone).mean(0))
    parts = [functools.partial(step, p) for p in members]
    logits, _ = decoding.average_steps(parts)(tokens, tuple(caches), zero)
    torch.testing.assert_close(logits.exp(), torch.stack(alone).mean(0))


def test_stacked_members_search_as_separate_ones():
    model, members, cache = two_models()
    stacked = stack(members)
    step = tf.decode_step(model)
    arguments = {"batch": 2, "beams": 3, "max_length": 6, "n_best": 2, **LIMITS}
    together = decoding.beam_search(
        decoding.ensemble_step(step, stacked),
        torch.vmap(cache, in_dims=(0, None))(stacked, 3),
        reorder_fn=decoding.ensemble_reorder(tf.reorder_cache),
        **arguments,
    )
    apart = decoding.beam_search(
        decoding.average_steps([functools.partial(step, p) for p in members]),
        tuple(cache(member, 3) for member in members),
        reorder_fn=lambda caches, rows: tuple(tf.reorder_cache(c, rows) for c in caches),
        **arguments,
    )
    torch.testing.assert_close(together, apart)


def test_an_ensemble_of_equals_is_its_member():
    model, members, cache = two_models()
    stacked = stack([members[0]] * 2)
    step = tf.decode_step(model)
    arguments = {"batch": 2, "beams": 3, "max_length": 6, **LIMITS}
    together = decoding.beam_search(
        decoding.ensemble_step(step, stacked),
        torch.vmap(cache, in_dims=(0, None))(stacked, 3),
        reorder_fn=decoding.ensemble_reorder(tf.reorder_cache),
        **arguments,
    )
    alone = decoding.beam_search(
        functools.partial(step, members[0]),
        cache(members[0], 3),
        reorder_fn=tf.reorder_cache,
        **arguments,
    )
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams"),
        ({"beams": 2, "n_best": 3}, "n_best"),
        ({"beams": 2, "max_length": 0}, "max_length"),
        ({"beams": 2, "early_stopping": "always"}, "early_stopping"),
        ({"beams": 2, "length_norm": "mean"}, "length_norm"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
    ],
)
def test_bad_options_are_named(options, message):
    arguments = {"batch": 1, "max_length": 3, **LIMITS, **options}
    search = decoding.beam_search if "beams" in options else decoding.sample
    key = () if "beams" in options else (random.key(0),)
    with pytest.raises(ValueError, match=message):
        search(table_model(0, 5, 3), empty(2, 3), *key, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "eager kernels"])
def test_cuda_graphs_return_what_eager_returns(compile):
    model, members, _ = two_models()
    params = {name: value.cuda() for name, value in members[0].items()}
    lengths = torch.tensor([5, 3], device="cuda")
    runner = decoding.Compiled(compile=compile)
    step_fn = functools.partial(tf.decode_step(model), params)
    for seed in (0, 1):  # the second search replays the graph of the first on another source
        generator = torch.Generator().manual_seed(seed)
        source = torch.randint(3, 17, (2, 5), generator=generator).cuda()
        memory = model.apply(params, source, lengths, method="encode")
        cache = model.apply(params, memory, lengths, 12, 3, method="init_cache")
        search = functools.partial(
            decoding.beam_search,
            step_fn,
            cache,
            batch=2,
            beams=3,
            max_length=12,
            n_best=3,
            reorder_fn=tf.reorder_cache,
            **LIMITS,
        )
        want = search()
        torch.cuda._sleep(2**31)  # a second: what is recorded must wait for a stream that is behind
        torch.testing.assert_close(search(runner=runner), want, atol=1e-4, rtol=1e-4)
