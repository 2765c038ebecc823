"""Generation: rows equal rows alone, streams equal calls, compiled equals eager."""

import functools
import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from msfs_functional import random
from msfs_functional.generation import (
    GREEDY,
    Generator,
    LanguageModel,
    Sampling,
    Settings,
    Text,
    first_largest,
    right_padded,
)
from msfs_functional.models import llama2c, pretrained
from msfs_functional.models.decoder import DecoderConfig, decoder, fuse, gpt2
from msfs_functional.models.decoder_generation import language_model

CONFIG = DecoderConfig(
    37, width=16, depth=2, heads=4, kv_heads=2, hidden=24, windows=(5, None), tied=False
)
MODEL = decoder(CONFIG)
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [7], [8, 9, 10, 11]]
SAMPLING = Sampling(0.9, top_k=20, top_p=0.95, min_p=0.01)


def build(dtype=torch.float64, device="cpu"):
    keys = random.split(random.key(5), len(MODEL.shapes))
    return {
        name: 0.5 * random.normal(key, shape, dtype=dtype).to(device) + ("norm" in name)
        for key, (name, shape) in zip(keys, MODEL.shapes.items(), strict=True)
    }


PARAMS = build()
EAGER = Generator(language_model(MODEL, PARAMS), text_fn=lambda ids: "".join(f"<{i}>" for i in ids))


def row(generated, i: int) -> list[int]:
    return generated.tokens[i, : generated.lengths[i]].tolist()


def first_new_pair(tokens: list[int]) -> int:
    """Where two tokens follow each other that did not do so before, some way into the row."""
    pairs = list(itertools.pairwise(tokens))
    return next(t for t in range(3, len(pairs)) if pairs[t] not in pairs[:t])


@pytest.mark.parametrize("V", [5, 1024, 1025, 2100])
def test_the_first_of_the_largest_is_found_wherever_it_is(V):
    x = torch.randint(4, (40, V)).float()
    x[0], x[1, -1], x[2, V // 2] = -torch.inf, 9.0, torch.nan
    x[3, :-1], x[4, 1:] = -torch.inf, 0.0
    found = first_largest(x)
    assert torch.equal(found, x.argmax(-1))
    assert torch.equal(torch.vmap(first_largest)(x), found)


def test_greedy_tokens_and_logps_are_those_of_the_full_forward():
    out = EAGER(PROMPTS, Settings(9, GREEDY))
    for i, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for t in range(9):
            logits = MODEL.apply(PARAMS, torch.tensor([ids]), implementation="reference")[0, -1]
            assert out.tokens[i, t] == logits.argmax()
            expected = logits.float().log_softmax(-1).max()
            torch.testing.assert_close(out.logps[i, t], expected, atol=1e-5, rtol=0)
            ids.append(int(logits.argmax()))
    assert out.tokens.unique().numel() > 6  # a model that says something


def test_a_row_of_a_batch_equals_the_row_alone():
    keys = random.split(random.key(1), 3)
    together = EAGER(PROMPTS, Settings(9, SAMPLING, samples=2), key=keys)
    assert row(together, 0) != row(together, 1)
    for i, prompt in enumerate(PROMPTS):
        for samples in (1, 3):
            alone = EAGER([prompt], Settings(9, SAMPLING, samples=samples), key=keys[i : i + 1])
            assert row(alone, 0) == row(together, 2 * i)
            torch.testing.assert_close(alone.logps[0], together.logps[2 * i])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_tensors_give_what_lists_give(side):
    tokens, mask = torch.full((3, 8), 36), torch.zeros(3, 8, dtype=torch.int64)
    for i, prompt in enumerate(PROMPTS):
        part = slice(8 - len(prompt), None) if side == "left" else slice(len(prompt))
        tokens[i, part], mask[i, part] = torch.tensor(prompt), 1
    settings = Settings(6, SAMPLING)
    expected = EAGER(PROMPTS, settings, key=random.key(2))
    out = EAGER(tokens, settings, key=random.key(2), mask=mask)
    assert torch.equal(out.tokens, expected.tokens)
    padded, lengths = right_padded(tokens, mask)
    assert lengths.tolist() == [7, 1, 4] and padded[2, :4].tolist() == PROMPTS[2]


def test_a_growing_cache_changes_nothing(monkeypatch):
    monkeypatch.setattr("msfs_functional.generation.BUCKET", 4)
    prompts = [[3] * 10, [4] * 3]
    static = EAGER(prompts, Settings(40, SAMPLING), key=random.key(3))
    growing = EAGER(prompts, Settings(40, SAMPLING, growing=True), key=random.key(3))
    assert torch.equal(static.tokens, growing.tokens)
    torch.testing.assert_close(static.logps, growing.logps)


def test_stop_tokens_end_rows_wherever_they_are():
    free = EAGER(PROMPTS, Settings(12, SAMPLING), key=random.key(4))
    stop = int(free.tokens[0, 4])
    out = EAGER(PROMPTS, Settings(12, SAMPLING, stop_tokens=(stop, 99), pad=0), key=random.key(4))
    for i in range(3):
        tokens = row(free, i)
        expected = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert row(out, i) == expected
        assert out.ended[i] == (stop in tokens)
        assert (out.tokens[i, len(expected) :] == 0).all()
        assert (out.logps[i, len(expected) :] == 0).all()
        assert out.texts[i] == "".join(f"<{t}>" for t in expected if t != stop)


@pytest.mark.parametrize("every", [1, 3, 20])
def test_stop_strings_end_rows_however_often_one_looks(every):
    generate = Generator(EAGER.model, text_fn=EAGER.text_fn, every=every)
    free = generate(PROMPTS, Settings(12, SAMPLING), key=random.key(4))
    tokens = row(free, 1)
    t = first_new_pair(tokens)
    stop = f"<{tokens[t]}><{tokens[t + 1]}"
    settings = Settings(12, SAMPLING, stop_strings=(stop, "not there"))
    out = generate(PROMPTS, settings, key=random.key(4))
    assert row(out, 1) == tokens[: t + 2] and out.ended[1]
    assert out.texts[1] == "".join(f"<{i}>" for i in tokens[:t])
    for i in (0, 2):
        assert out.ended[i] == (stop in free.texts[i])


@pytest.mark.parametrize("every", [1, 4])
def test_a_stream_gives_the_tokens_and_texts_of_a_call(every):
    free = EAGER(PROMPTS, Settings(12, SAMPLING), key=random.key(4))
    tokens = row(free, 1)
    t, stop = first_new_pair(tokens), int(free.tokens[2, 6])
    strings = (f"<{tokens[t]}><{tokens[t + 1]}>",)
    settings = Settings(12, SAMPLING, stop_tokens=(stop,), stop_strings=strings)
    expected = EAGER(PROMPTS, settings, key=random.key(4))
    tokens: list[list[int]] = [[], [], []]
    texts, ended = [""] * 3, [False] * 3
    for pieces in EAGER.stream(PROMPTS, settings, key=random.key(4), every=every):
        for piece in pieces:
            assert not ended[piece.row]
            tokens[piece.row] += piece.tokens
            texts[piece.row] += piece.text
            ended[piece.row] = piece.ended
    assert tokens == [row(expected, i) for i in range(3)]
    assert texts == expected.texts and ended == expected.ended.tolist()


def test_text_waits_for_whole_characters_and_possible_stops():
    pieces = [b"a", b"\xe2\x82", b"\xac", b"EN", b"E", b"ND", b"x"]
    text = Text(lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"), ("END",))
    seen, given = [], []
    for token in range(7):
        over = text.add(token)
        seen.append(text.take(final=over))
        given.append(over)
        if over:
            break
    assert seen == ["a", "", "€", "", "EN", ""]  # "EN" may begin "END"; "ENE" still may
    assert given == [False] * 5 + [True] and text.text == "a€EN"
    cut = Text(lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"))
    cut.add(0)
    cut.add(1)
    assert cut.take(final=False) == "a" and cut.take(final=True) == "\ufffd"


def test_any_three_functions_are_a_language_model():
    """Counts upwards: the cache is one number a row."""

    def step(tokens, cache, positions):
        assert ((cache["last"] + 1 == tokens) | (tokens == 0)).all()  # 0: the padding of ended rows
        return torch.nn.functional.one_hot(tokens + 1, 50).float(), {"last": tokens}

    counting = LanguageModel(
        init_cache=lambda rows, length: {"last": torch.zeros(rows, dtype=torch.int64)},
        prefill=lambda tokens, lengths, cache: step(
            last := tokens.take_along_dim(lengths[:, None] - 1, 1)[:, 0], {"last": last - 1}, None
        ),
        step=step,
        max_length=40,
        device="cpu",
    )
    out = Generator(counting)([[1, 2], [7]], Settings(5, GREEDY, stop_tokens=(10,)))
    assert [row(out, 0), row(out, 1)] == [[3, 4, 5, 6, 7], [8, 9, 10]]


@torch.no_grad()
def test_greedy_tokens_equal_transformers_generate():
    torch.manual_seed(0)
    theirs: transformers.GPT2LMHeadModel = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=41, n_embd=24, n_layer=2, n_head=4, n_positions=64)
    ).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    config, params = pretrained.from_hub(theirs.config.to_dict(), theirs.state_dict())
    tokens = torch.randint(3, 41, (3, 9))
    mask = (torch.arange(9) >= torch.tensor([[0], [3], [7]])).long()  # padded on the left
    expected = theirs.generate(
        tokens, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0
    )[:, 9:]
    generate = Generator(language_model(decoder(config), params))
    out = generate(tokens, Settings(20, GREEDY, stop_tokens=(50256,)), mask=mask)
    assert torch.equal(out.tokens, expected) and out.tokens.unique().numel() > 4


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "neither"])
def test_a_single_row_by_fewer_launches_gives_the_same(kind, fused):
    sizes = {"width": 16, "depth": 2, "heads": 4, "max_length": 64}
    config = {
        "llama": DecoderConfig(37, kv_heads=2, hidden=24, windows=(5, None), **sizes),
        "gpt2": gpt2(37, hidden=24, **sizes),
        "neither": DecoderConfig(37, hidden=24, qk_norm=True, logit_softcap=3.0, **sizes),
    }[kind]
    model = decoder(config)
    params = {
        name: 0.5 * random.normal(random.key(i), shape, dtype=torch.float64) + ("norm" in name)
        for i, (name, shape) in enumerate(model.shapes.items())
    }
    if fused:
        model, params = decoder(replace(config, fused=True)), fuse(params)
    fast = Generator(language_model(model, params, fast_row=True))
    plain = Generator(language_model(model, params))
    for prompts in (PROMPTS[:1], PROMPTS[1:]):  # the latter are two rows, which it leaves alone
        out, expected = (g(prompts, Settings(20, GREEDY)) for g in (fast, plain))
        assert torch.equal(out.tokens, expected.tokens) and out.logps.unique().numel() > 9
        torch.testing.assert_close(out.logps, expected.logps)


@pytest.fixture
def uncompiled(monkeypatch):
    """A Generator that keeps and rounds as a compiled one does, without the compiler."""
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    monkeypatch.setattr("msfs_functional.generation.BUCKET", 8)
    return functools.partial(Generator, EAGER.model, text_fn=EAGER.text_fn, compile=True)


def test_aligned_logits_are_those_of_the_weights_as_they_are_now():
    """Their copy is made anew by each call: training writes into the parameters in place."""
    params = build()
    model, aligned = (language_model(MODEL, params, aligned=here) for here in (False, True))
    for _ in range(2):
        out, expected = (
            Generator(each)(PROMPTS, Settings(9, SAMPLING), key=random.key(0))
            for each in (aligned, model)
        )
        assert torch.equal(out.tokens, expected.tokens)
        torch.testing.assert_close(out.logps, expected.logps)
        params["output.weight"].neg_()


def test_kept_and_rounded_states_give_the_same(uncompiled):
    generate = uncompiled(keep=2)
    growing = {"max_new_tokens": 30, "growing": True}
    for prompts, options in (
        (PROMPTS, {"samples": 2, "stop_tokens": (5, 6), "stop_strings": ("<7",)}),
        ([[3] * 10], growing),
        (PROMPTS[:1], {"sampling": GREEDY}),
        ([[4] * 10], growing),
        ([[5] * 10], growing),  # in the memory of the one before
    ):
        settings = Settings(**{"max_new_tokens": 12, "sampling": SAMPLING, **options})
        out, expected = (g(prompts, settings, key=random.key(6)) for g in (generate, EAGER))
        assert torch.equal(out.tokens, expected.tokens)
        torch.testing.assert_close(out.logps, expected.logps)
        assert out.texts == expected.texts and torch.equal(out.ended, expected.ended)
    assert [capacity for _, capacity, *_ in generate._kept] == [24, 40]


def test_streams_at_the_same_time_do_not_meet(uncompiled):
    generate, settings = uncompiled(keep=1), Settings(6, SAMPLING)
    streams = [generate.stream([[p]], settings, key=random.key(p)) for p in (3, 4)]
    pairs = list(zip(*streams, strict=True))
    for p, pieces in zip((3, 4), zip(*pairs, strict=True), strict=True):
        tokens = [token for (piece,) in pieces for token in piece.tokens]
        assert tokens == row(EAGER([[p]], settings, key=random.key(p)), 0)


SMALL = decoder(gpt2(11, width=8, depth=1, heads=2, hidden=8, max_length=64))


def small_model() -> LanguageModel:
    keys = random.split(random.key(5), len(SMALL.shapes))
    return language_model(
        SMALL,
        {
            name: 0.5 * random.normal(key, shape)
            for key, (name, shape) in zip(keys, SMALL.shapes.items(), strict=True)
        },
    )


def test_traced_generation_equals_eager(monkeypatch):
    """Prefill and step as whole graphs, functionalized, without code generation."""
    plain = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda fn, options, **rest: plain(fn, backend="aot_eager", **rest)
    )
    monkeypatch.setattr(
        "msfs_functional.generation.compile_per_shape",
        lambda fn, dynamic: plain(fn, backend="aot_eager", fullgraph=True, dynamic=dynamic),
    )
    settings = Settings(6, Sampling(0.9, top_k=9, top_p=0.9), samples=2, stop_tokens=(5,))
    generate, eager = Generator(small_model(), compile=True), Generator(small_model())
    for seed, prompts in enumerate(([[3, 4], [5]], [[6], [7, 8, 9]])):
        out, expected = (g(prompts, settings, key=random.key(seed)) for g in (generate, eager))
        assert torch.equal(out.tokens, expected.tokens)
        torch.testing.assert_close(out.logps, expected.logps)


def test_a_compiled_step_equals_eager(monkeypatch):
    """With code generation, which writes into the cache in place: the next token is the sum of all
    so far. (Little to compile; the decoder is traced above, and compiled on a GPU.)"""
    monkeypatch.setattr("msfs_functional.generation.compile_per_shape", lambda fn, dynamic: fn)

    def logits(cache):
        return torch.nn.functional.one_hot(cache.sum(1) % 11, 11).float()

    def prefill(tokens, lengths, cache):
        inside = torch.arange(tokens.shape[1]) < lengths[:, None]
        cache = torch.where(inside, tokens, 0)
        return logits(cache), cache

    def step(tokens, cache, positions):
        cache = cache.index_put((torch.arange(len(tokens)), positions), tokens)
        return logits(cache), cache

    init_cache = lambda rows, length: torch.zeros(rows, length, dtype=torch.int64)  # noqa: E731
    model = LanguageModel(init_cache, prefill, step, 64, "cpu")
    generate = Generator(model, compile=True)
    for prompts in ([[3, 4], [5]], [[6], [7, 8, 9]]):
        out = generate(prompts, Settings(8, GREEDY))
        for i, prompt in enumerate(prompts):
            tokens = list(prompt)
            for _ in range(8):
                tokens.append(sum(tokens) % 11)
            assert row(out, i) == tokens[len(prompt) :]
    assert len(generate._kept) == 1


def test_blocks_compiled_once_generate_the_same(monkeypatch):
    """As "regions", traced: the cache is written in place by a graph that all blocks share."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda fn, options=None, **rest: plain(fn, backend=backend, **rest)
    )
    monkeypatch.setattr("msfs_functional.generation.BUCKET", 16)
    settings = Settings(12, Sampling(0.9, top_k=9), stop_tokens=(5,))
    deep = decoder(replace(CONFIG, windows=(None,), depth=3))
    params = {name: value for name, value in deep.init(0).items()}
    model = language_model(deep, params)
    generate, eager = Generator(model, compile="regions"), Generator(model)
    for seed, prompts in enumerate((PROMPTS, PROMPTS[::-1])):
        out, expected = (g(prompts, settings, key=random.key(seed)) for g in (generate, eager))
        assert torch.equal(out.tokens, expected.tokens)
        torch.testing.assert_close(out.logps, expected.logps)
    assert len(graphs) == 4  # block and drawing, of prefill and of a step


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [True, "regions"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_generation_by_cuda_graphs_equals_eager(sampling, compile):
    model = language_model(MODEL, build(torch.float32, "cuda"))
    generate, eager = Generator(model, compile=compile), Generator(model, compile=False)
    for seed, options in ((1, {}), (2, {}), (3, {"samples": 3, "stop_tokens": (5,)}), (4, {})):
        settings, key = Settings(24, sampling, **options), random.key(seed)
        out, expected = generate(PROMPTS, settings, key=key), eager(PROMPTS, settings, key=key)
        assert torch.equal(out.tokens, expected.tokens)
        torch.testing.assert_close(out.logps, expected.logps, atol=1e-4, rtol=1e-4)


def test_stories260k_tells_its_published_story():
    root = Path(__file__).parents[1]
    data = Path(os.environ.get("MSFS_DATA", root.parent / "shared" / "data"))
    folder = data / "weights" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: MSFS_DATA names the one with weights")
    config, params = llama2c.read_model(folder / "stories260K.bin")
    tokens = llama2c.read_tokens(folder / "tok512.bin")
    generate = Generator(
        language_model(decoder(config), params),
        text_fn=lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace"),
    )
    story = (folder / "stories260K.md").read_text().split("-t 0.0\n")[1].split("\n```")[0]
    assert generate([[1]], Settings(256, GREEDY)).texts == [" " + story]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Settings(0), "max_new_tokens"),
        (lambda: Settings(1, samples=0), "samples"),
        (lambda: Settings(1, stop_strings=("",)), "stop_strings"),
        (lambda: Sampling(-1.0), "temperature"),
        (lambda: Sampling(top_k=0), "top_k"),
        (lambda: Sampling(top_p=1.5), "top_p"),
        (lambda: Sampling(min_p=0.0), "min_p"),
        (lambda: EAGER([], Settings(1, GREEDY)), "0 prompts"),
        (lambda: EAGER([[1], []], Settings(1, GREEDY)), "at least one token"),
        (lambda: EAGER([[1] * 1000], Settings(100, GREEDY)), "exceed the model's max_length"),
        (lambda: EAGER([[1]], Settings(1)), "needs a key"),
        (lambda: EAGER([[1]], Settings(1), key=random.split(random.key(0), 2)), "key"),
        (lambda: EAGER([[1]], Settings(1, GREEDY), mask=torch.ones(1, 1)), "mask"),
        (
            lambda: Generator(EAGER.model)([[1]], Settings(1, GREEDY, stop_strings=("a",))),
            "text_fn",
        ),
        (lambda: Generator(EAGER.model, every=0), "every"),
    ],
)
def test_bad_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
