"""The Triton kernels compute attention: run by Triton's interpreter on the CPU and compared with
float64.

Everything here runs in a child process (interpreting.py).
"""

import pytest
import torch


def small_tiles(tma: bool = False, keys: int = 16) -> None:
    """Tiles of 16 queries x `keys` in every kernel, so that few tokens make many blocks."""
    from msfs_kernels import triton_common
    from msfs_kernels.configs import Config

    triton_common.LEAST_LOGITS_FOR_TMA = 0
    choose_tiles_by(lambda *_: Config(16, keys, 4, 1, tma))


def choose_tiles_by(choose) -> None:
    from msfs_kernels import (
        triton_backward,
        triton_bias,
        triton_dual,
        triton_forward,
        triton_rows,
        triton_tangent,
    )

    modules = (triton_backward, triton_bias, triton_dual, triton_forward)
    for module in (*modules, triton_rows, triton_tangent):
        module.choose = choose


def failures_of_seed(seed: int) -> list[str]:
    from msfs_kernels.triton_check import failures, random_case

    torch.set_num_threads(1)
    small_tiles()
    # The interpreter multiplies bfloat16 tiles as integers; the GPU check covers it.
    case = random_case(seed, "cpu", largest=24, dtypes=(torch.float16, torch.float32))
    return [f"{case.name}: {line}" for line in failures(case)]


def failures_with_fitted_tiles(seed: int) -> list[str]:
    from msfs_kernels.configs import choose
    from msfs_kernels.triton_check import failures, random_case

    choose_tiles_by(choose)  # which other tests replace
    torch.set_num_threads(1)
    case = random_case(seed, "cpu", largest=40, dtypes=(torch.float16,))
    return [f"{case.name}: {line}" for line in failures(case)]


def test_tiles_fitted_to_short_sentences_agree_with_the_formula(interpreter):
    from msfs_kernels.configs import Config, fitted

    large = Config(128, 128, 8, 3, True)
    assert fitted(large, 20, 20) == Config(32, 32, 2, 3, True)
    assert fitted(large, 5, 40) == Config(16, 64, 2, 3, True)
    assert fitted(large, 100, 1000) == large
    assert interpreter(failures_with_fitted_tiles, 0) == []


@pytest.mark.parametrize("seed", range(2, 5))
def test_random_shapes_strides_and_options_agree_with_the_formula(interpreter, seed):
    assert interpreter(failures_of_seed, seed) == []


def made(T, S, K=16, V=16, B=2, H=2, G=1, dtype=torch.float16, **options):
    """q, k, v and options; a field given as a function is called with a generator."""
    from msfs_kernels.options import Options

    generator = torch.Generator().manual_seed(7)
    q = torch.randn(B, H, T, K, generator=generator).to(dtype)
    k = torch.randn(B, G, S, K, generator=generator).to(dtype)
    v = torch.randn(B, G, S, V, generator=generator).to(dtype)
    return q, k, v, Options(**{"scale": K**-0.5} | options)


def failures_with(name: str, tma: bool, deterministic: bool, T=21, S=39, keys=16) -> list[str]:
    from msfs_kernels.triton_check import Case, failures

    torch.set_num_threads(1)
    small_tiles(tma, keys)
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    options = {
        "plain": {},
        "causal": {"causal": True},
        "window": {"window": 9},
        "causal window": {"causal": True, "window": 18},
        "key lengths": {"key_lengths": torch.tensor([20, 0], dtype=torch.int32)},
        "prefix": {"causal": True, "prefix_lengths": torch.tensor([33, 5], dtype=torch.int32)},
        "prefix and window": {
            "window": 8,
            "prefix_lengths": torch.tensor([0, 18], dtype=torch.int32),
        },
        "segments": {
            "q_segments": torch.arange(T, dtype=torch.int32)
            .div(13, rounding_mode="floor")
            .repeat(2, 1),
            "k_segments": torch.arange(S, dtype=torch.int32)
            .div(19, rounding_mode="floor")
            .repeat(2, 1),
        },
        "softcap": {"softcap": 1.5, "scale": 1.0},
        "alibi": {"alibi": noise(2, 2).abs(), "causal": True},
        "bias over rows": {"bias": noise(1, 2, T, S).half()},
        "bias over queries": {"bias": noise(2, 1, 1, S).half(), "causal": True},
        "bias over keys": {"bias": noise(2, 2, T, 1).half()},
        "boolean bias": {"bias": noise(2, 1, T, S) > 0},
        "dropout": {"dropout": 0.3, "rng": torch.tensor([[1, 2], [3, 2**32 - 1]])},
        "dropout of some heads": {
            "dropout": 0.3,
            "rng": torch.tensor([[[1, 2, 5], [1, 2, 9]], [[3, 4, 5], [3, 4, 9]]]),
        },
        "negative scale": {"scale": -0.2},
    }[name]
    rows = max((len(x) for x in options.values() if isinstance(x, torch.Tensor)), default=1)
    q, k, v, made_options = made(T, S, B=rows, **options, deterministic=deterministic)
    return failures(Case(name, q, k, v, made_options))


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "causal",
        "window",
        "causal window",
        "key lengths",
        "prefix",
        "prefix and window",
        "segments",
        "softcap",
        "alibi",
        "bias over rows",
        "bias over queries",
        "bias over keys",
        "boolean bias",
        "dropout",
        "dropout of some heads",
        "negative scale",
    ],
)
def test_each_option_alone_agrees_with_the_formula(interpreter, name):
    assert interpreter(failures_with, name, False, False) == []


@pytest.mark.parametrize("name", ["plain", "causal window", "boolean bias"])
def test_deterministic_gradients_agree_with_the_formula(interpreter, name):
    assert interpreter(failures_with, name, False, True) == []


@pytest.mark.parametrize(
    ("name", "T", "S"),
    [
        ("plain", 21, 30),
        ("causal", 50, 18),
        ("causal window", 50, 18),
        ("key lengths", 21, 30),
        ("segments", 40, 30),
        ("boolean bias", 21, 30),
    ],
)
def test_gradients_of_queries_whose_keys_fit_one_tile_agree_with_the_formula(
    interpreter, name, T, S
):
    assert interpreter(failures_with, name, False, False, T, S, 32) == []


def failures_with_two_kernels():
    from unittest import mock

    from msfs_kernels import configs, triton_backward

    chosen = configs.key("fused", configs.chip(), torch.float16, 16, False, 39)
    launched, launch = [], triton_backward.launch

    def watched(plan, *args):
        launched.append(plan.__name__)
        launch(plan, *args)

    with (
        mock.patch.object(configs, "table", lambda: {chosen: None}),
        mock.patch.object(triton_backward, "launch", watched),
    ):
        assert configs.is_fastest("fused", torch.float16, 16, True, 39)
        return failures_with("plain", False, False), launched


def test_null_in_the_table_means_two_kernels_in_place_of_the_fused_one(interpreter):
    assert interpreter(failures_with_two_kernels) == (
        [],
        ["plan_queries", "plan_keys"],
    )


@pytest.mark.parametrize("name", ["plain", "causal window"])
def test_tiles_through_the_copy_engine_agree_with_the_formula(interpreter, name):
    assert interpreter(failures_with, name, True, False) == []


def everything(q, k, v, options):
    from msfs_kernels.triton_backend import backward, forward, tangent

    o, lse = forward(q, k, v, options)
    dq, dk, dv, _ = backward(torch.ones_like(o), None, q, k, v, o, lse, options, False)
    to, tlse = tangent(q, k, v, None, q, k, v, o, lse, options)
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "to": to, "tlse": tlse}


def results(T, S, poison_from=None, **options):
    torch.set_num_threads(1)
    small_tiles()
    q, k, v, made_options = made(T, S, **options)
    if poison_from is not None:
        k[:, :, poison_from:] = float("nan")
        v[:, :, poison_from:] = float("nan")
    return everything(q, k, v, made_options)


@pytest.mark.parametrize(
    "options",
    [
        {"key_lengths": torch.tensor([32, 16], dtype=torch.int32)},
        {"window": 17, "causal": True, "key_lengths": torch.tensor([32, 32], dtype=torch.int32)},
        {
            "q_segments": torch.zeros(2, 40, dtype=torch.int32),
            "k_segments": (torch.arange(80) // 32).to(torch.int32).repeat(2, 1),
        },
    ],
    ids=["key lengths", "window", "segments"],
)
def test_blocks_that_are_hidden_whole_are_never_read(interpreter, options):
    got = interpreter(poisoned, options)
    assert all(x.isfinite().all() for name, x in got.items() if name != "lse"), got.keys()
    assert not got["dk"][:, :, 32:].any() and not got["dv"][:, :, 32:].any()


def poisoned(options):
    return results(40, 80, 32, **options)


def no_keys():
    return results(40, 24, causal=True)  # T > S: the first 16 queries stand before the first key


def test_a_query_without_keys_gives_zeros_and_zero_gradients(interpreter):
    got = interpreter(no_keys)
    assert (got["lse"][:, :, :16] == float("-inf")).all() and got["lse"][:, :, 16:].isfinite().all()
    for name in ("o", "dq", "to", "tlse"):
        assert not got[name][:, :, :16].any(), name


def with_lengths(field, lengths, T):
    return results(T, 24, B=3, H=1, **{field: torch.tensor(lengths, dtype=torch.int32)})


@pytest.mark.parametrize("field", ["key_lengths", "prefix_lengths"])
@pytest.mark.parametrize("T", [20, 2], ids=["forward", "decoding"])
def test_a_row_of_wrong_length_is_nan_and_the_others_are_right(interpreter, field, T):
    got = interpreter(with_lengths, field, [-1, 25, 20], T)
    want = interpreter(with_lengths, field, [24, 24, 20], T)
    for name, x in got.items():
        assert x[:2].isnan().all(), name
        assert torch.equal(x[2], want[name][2]), name


def one_token():
    return results(1, 1)


def test_one_token_attends_to_itself(interpreter):
    got = interpreter(one_token)
    assert got["o"].shape == (2, 2, 1, 16) and got["dq"].abs().max() < 1e-2


def large_logits():
    from msfs_kernels.triton_check import Case, failures

    small_tiles()
    q, k, v, options = made(17, 17, dtype=torch.float32, scale=-40.0, causal=True)
    return failures(Case("large", q, k, v, options)), everything(q, k, v, options)["lse"]


def test_log_sum_exps_far_beyond_88_on_either_side_are_safe(interpreter):
    wrong, lse = interpreter(large_logits)
    assert lse.min() < -88 and lse.max() > 88
    assert wrong == []


def errors_of_query_gradients():
    """Squared, of the kernels and of the plain formula in float32, summed over some draws."""
    from msfs_kernels.triton_backend import backward, forward
    from msfs_kernels.triton_check import textbook

    small_tiles()
    ours = plain = 0.0
    for seed in range(12):
        options = made(5, 5, causal=True, window=2, scale=0.5, deterministic=seed % 2 == 0)[3]
        generator = torch.Generator().manual_seed(seed)
        q, k, v, do = torch.randn(4, 1, 1, 16, 4, generator=generator)

        def formula(dtype, q=q, k=k, v=v, do=do, options=options):
            leaf = q.to(dtype).requires_grad_()
            o, _ = textbook(leaf, k.to(dtype), v.to(dtype), None, options)
            return torch.autograd.grad(o, leaf, do.to(dtype))[0]

        exact = formula(torch.float64)
        dq = backward(do, None, q, k, v, *forward(q, k, v, options), options, False)[0]
        ours += float((dq - exact).square().sum())
        plain += float((formula(torch.float32) - exact).square().sum())
    return ours, plain


def test_rows_of_few_keys_leave_gradients_the_error_of_the_plain_formula(interpreter):
    ours, plain = interpreter(errors_of_query_gradients)
    assert ours < 1.3**2 * plain  # 1.55 without the mean over the very numbers


def memory_layouts():
    small_tiles()
    q, k, v, options = made(20, 30)
    return {name: x.stride() for name, x in everything(q, k, v, options).items()}


def test_results_are_laid_out_tokens_first(interpreter):
    strides = interpreter(memory_layouts)
    assert strides["o"] == (20 * 2 * 16, 16, 2 * 16, 1)
    assert strides["dk"] == (30 * 16, 16, 16, 1)


def empty():
    return results(0, 5), results(5, 0)


def test_no_queries_or_no_keys_give_empty_or_zero_results(interpreter):
    without_queries, without_keys = interpreter(empty)
    assert without_queries["o"].shape == (2, 2, 0, 16) and not without_queries["dk"].any()
    assert not without_keys["o"].any() and not without_keys["dq"].any()


def decoding_errors(T, S, heads, options):
    from msfs_kernels import triton_decode
    from msfs_kernels.configs import Config
    from msfs_kernels.triton_check import textbook

    triton_decode.choose = lambda *_: Config(16, 32, 4, 1)
    triton_decode.SHORTEST_SLICE = 40
    q, k, v, made_options = made(T, S, H=heads[0], G=heads[1], **options)
    assert triton_decode.slices(q, k) > 1
    o, lse = triton_decode.decode(q, k, v, made_options)
    bias = made_options.bias
    exact = textbook(q.double(), k.double(), v.double(), bias, made_options)
    finite = exact[1] > float("-inf")
    assert torch.equal(lse > float("-inf"), finite)
    return float((o - exact[0]).abs().max()), float((lse - exact[1])[finite].abs().max())


@pytest.mark.parametrize(
    "T, S, heads, options",
    [
        (1, 200, (2, 2), {}),
        (1, 130, (6, 2), {"key_lengths": torch.tensor([50, 0], dtype=torch.int32)}),
        (5, 133, (4, 2), {"causal": True, "window": 90}),
        (
            2,
            100,
            (4, 2),
            {
                "alibi": torch.linspace(0, 1, 8).view(2, 4),
                "softcap": 2.0,
                "dropout": 0.3,
                "rng": torch.tensor([[1, 2], [3, 4]]),
            },
        ),
        (16, 90, (2, 1), {"bias": torch.linspace(-1, 1, 180).view(1, 2, 1, 90).half()}),
    ],
)
def test_decoding_over_slices_of_the_keys_equals_the_formula(interpreter, T, S, heads, options):
    error, lse_error = interpreter(decoding_errors, T, S, heads, options)
    assert error < 1e-3 and lse_error < 1e-5


def words_of_strided_keys() -> tuple[torch.Tensor, ...]:
    from msfs_kernels import philox, philox_triton

    keys = torch.arange(12).view(3, 4)[:, :2]  # as `split` makes them
    words, bits = torch.empty(3, 5, 4, dtype=torch.int64), torch.empty(3, 2, dtype=torch.uint8)
    philox_triton.words(lambda kernel: kernel, keys, torch.arange(5)[None], 3, words)
    philox_triton.bits(lambda kernel: kernel, keys, 2**14, bits, philox.DROPOUT)
    expected = philox.philox_words(keys, torch.arange(5), 3)
    return words, expected, bits, philox.dropout_bits(keys, 16, 2**14)


def test_random_words_of_keys_of_any_strides_are_those_of_the_cpu(interpreter):
    words, expected, bits, expected_bits = interpreter(words_of_strided_keys)
    assert torch.equal(words, expected) and torch.equal(bits, expected_bits)


class Interpreted:
    """A launch as Triton compiles it: started again with other arguments."""

    def __init__(self, described):
        self.described = described

    def __getitem__(self, grid):
        return self.described.kernel[grid]


def run_interpreted(described):
    described.kernel[described.grid](*described.args, **described.constants)
    return Interpreted(described)


def unequal_by_the_short_way() -> list[str]:
    """Calls of one kind, again and again, whose launches are replayed as on a GPU; the first has
    one tensor in three places.
    """
    from contextlib import ExitStack
    from unittest import mock

    from msfs_kernels import flash_attention, launching, ops, short, triton_backend
    from torch.func import jvp

    def plain(q, k, v):
        return ((q @ k.mT) * 16**-0.5).softmax(-1) @ v

    def results(attention, x, t, do):
        alone = attention(*x)
        leaves = [y.clone().requires_grad_() for y in x]
        o = attention(*leaves)
        moved = jvp(attention, tuple(x), tuple(t))
        return {
            "o": alone,
            "recorded o": o,
            "jvp": moved[1],
            "jvp's o": moved[0],
            **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, do), strict=True)),
        }

    def on_cpu(shape, stride, dtype):
        return torch.empty_strided(shape, stride, dtype=dtype)

    def on_gpu(*tensors):
        return all(type(x) is torch.Tensor for x in tensors)

    torch.set_num_threads(1)
    small_tiles(keys=32)  # one tile of keys: the backward is launches only
    generator = torch.Generator().manual_seed(0)
    wrong = []
    with ExitStack() as stack:
        for where, name, value in (
            (launching, "INTERPRETED", False),
            (launching.Launch, "run", run_interpreted),
            (short, "are_plain", on_gpu),
            (short, "allocate", on_cpu),
            (ops, "backend", lambda q, v: triton_backend),
            (torch.cuda, "current_device", lambda: None),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(
            mock.patch.object(torch._C, "_cuda_getDevice", lambda: None, create=True)
        )
        for call in range(4):
            x, t = torch.randn(2, 3, 1, 2, 18, 16, generator=generator).half()
            do = torch.randn(1, 2, 18, 16, generator=generator).half()
            x = (x[0],) * 3 if call == 0 else x
            got = results(flash_attention, x, t, do)
            want = results(plain, [y.double() for y in x], [y.double() for y in t], do.double())
            for name, y in got.items():
                if not torch.allclose(y.double(), want[name], rtol=2e-2, atol=2e-2):
                    wrong.append(f"call {call}: {name}")
        (of_forward,) = short.REPLAYS.values()
        if (len(of_forward.backwards), len(short.DUALS)) != (1, 1):
            wrong.append(f"replayed: {of_forward.backwards} {short.DUALS}")
    return wrong


def test_replayed_launches_agree_with_the_formula(interpreter):
    assert interpreter(unequal_by_the_short_way) == []
