"""attention(): its masks as drawn, its implementations equal, its mistakes named."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msfs_functional import random
from msfs_functional.attention import attention, attention_mask, attention_weights

IMPLEMENTATIONS = ["reference", "sdpa", "flash"]


def drawn(mask: torch.Tensor) -> str:
    return "\n".join(" ".join("1" if seen else "." for seen in row) for row in mask.tolist())


def draw(picture: str) -> str:
    return "\n".join(line.strip() for line in picture.strip().splitlines())


def inputs(*batch, H=4, G=2, T=5, S=7, K=6, X=3, dtype=torch.float64, seed=0):
    """q, k, v (*batch, heads, length, dim), at random."""
    shapes = (*batch, H, T, K), (*batch, G, S, K), (*batch, G, S, X)
    keys = random.split(random.key(seed), 3)
    return [
        random.normal(key, shape, dtype=torch.float64).to(dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]


@pytest.mark.parametrize(
    ("options", "T", "S", "picture"),
    [
        ({"is_causal": True}, 2, 4, "1 1 1 .\n1 1 1 1"),
        ({"is_causal": True}, 3, 2, ". .\n1 .\n1 1"),
        ({"is_causal": True, "window": 2}, 4, 4, "1 . . .\n1 1 . .\n. 1 1 .\n. . 1 1"),
        ({"window": 2}, 4, 4, "1 1 . .\n1 1 1 .\n. 1 1 1\n. . 1 1"),
        ({"key_lengths": torch.tensor(3)}, 2, 4, "1 1 1 .\n1 1 1 ."),
        (
            {"is_causal": True, "prefix_lengths": torch.tensor(2)},
            4,
            4,
            "1 1 . .\n1 1 . .\n1 1 1 .\n1 1 1 1",
        ),
        (
            {"segment_ids": torch.tensor([0, 0, 1, 1])},
            4,
            4,
            "1 1 . .\n1 1 . .\n. . 1 1\n. . 1 1",
        ),
        (
            {"segment_ids": (torch.tensor([1, 2]), torch.tensor([2, 1, 1]))},
            2,
            3,
            ". 1 1\n1 . .",
        ),
        (
            {
                "is_causal": True,
                "window": 1,
                "prefix_lengths": torch.tensor(2),
                "key_lengths": torch.tensor(1),
            },
            3,
            3,
            "1 . .\n1 . .\n1 . .",
        ),
    ],
)
def test_masks_are_as_drawn(options, T, S, picture):
    assert drawn(attention_mask(T, S, **options)) == draw(picture)


def test_lengths_of_a_batch_make_a_mask_for_each_row():
    mask = attention_mask(2, 3, key_lengths=torch.tensor([[0, 3]]))
    assert mask.shape == (1, 2, 2, 3)
    assert drawn(mask[0, 0]) == ". . .\n. . ." and drawn(mask[0, 1]) == "1 1 1\n1 1 1"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_keys_by_hand(implementation):
    """Scores 0 and log 3 give weights 1/4 and 3/4."""
    q = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    k = torch.tensor([[[0.0, 5.0], [math.log(3), -7.0]]], dtype=torch.float64)
    v = torch.tensor([[[4.0], [8.0]]], dtype=torch.float64)
    out = attention(q, k, v, scale=1.0, implementation=implementation)
    torch.testing.assert_close(out, torch.tensor([[[7.0]]], dtype=torch.float64))


def test_weights_are_probabilities_that_average_the_values():
    q, k, v = inputs(2)
    lengths = torch.tensor([7, 4])
    weights = attention_weights(q, k, key_lengths=lengths, softcap=2.0)
    assert weights.shape == (2, 4, 5, 7) and (weights[1, ..., 4:] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))
    out = attention(q, k, v, key_lengths=lengths, softcap=2.0, implementation="reference")
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out)


@st.composite
def calls(draw):
    """Shapes and options of one call, all combinable."""
    pick = draw(st.randoms(use_true_random=False))
    batch = draw(st.sampled_from([(), (2,), (2, 3)]))
    G, R = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    T, S = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(pick.randrange(2**31))

    def lengths(high, *more):
        return torch.randint(0, high, (*batch, *more), generator=generator)

    choices = {
        "is_causal": lambda: True,
        "scale": lambda: 0.3,
        "window": lambda: pick.randint(1, 9),
        "key_lengths": lambda: lengths(S + 1),
        "prefix_lengths": lambda: lengths(S + 1),
        "segment_ids": lambda: (lengths(2, T), lengths(2, S)),
        "softcap": lambda: 1.5,
        "alibi_slopes": lambda: torch.linspace(0.1, 1, G * R, dtype=torch.float64),
        "bias": lambda: pick.choice(
            [
                torch.randn(T, S, generator=generator, dtype=torch.float64),
                torch.randn(*batch, 1, 1, S, generator=generator, dtype=torch.float64),
                torch.rand(*batch, G * R, T, S, generator=generator) < 0.6,
            ]
        ),
    }
    names = draw(st.sets(st.sampled_from(sorted(choices)), max_size=4))
    sizes = {"H": G * R, "G": G, "T": T, "S": S, "K": draw(st.integers(1, 9))}
    return batch, sizes, {name: choices[name]() for name in sorted(names)}


@given(calls())
def test_implementations_agree_on_any_options(call):
    batch, sizes, options = call
    q, k, v = (x.requires_grad_() for x in inputs(*batch, **sizes))
    cotangent = torch.linspace(-1, 1, 3, dtype=torch.float64)
    results = {}
    for implementation in IMPLEMENTATIONS:
        if implementation == "sdpa" and "softcap" in options:
            continue
        out = attention(q, k, v, **options, implementation=implementation)
        grads = torch.autograd.grad((out * cotangent).sum(), (q, k, v))
        results[implementation] = (out, *grads)
    for implementation, result in results.items():
        for ours, expected in zip(result, results["reference"], strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-10, msg=implementation)


def test_flash_and_reference_drop_the_same_weights():
    q, k, v = inputs(2, 3)
    options = {"dropout": 0.4, "dropout_key": random.key(5), "is_causal": True}
    out = attention(q, k, v, **options, implementation="reference")
    torch.testing.assert_close(attention(q, k, v, **options, implementation="flash"), out)
    other = attention(q, k, v, **{**options, "dropout_key": random.key(6)})
    assert not torch.allclose(other, out)


def test_dropout_keeps_the_mean():
    q, k, v = inputs(300, S=40)
    plain = attention(q, k, torch.ones_like(v), implementation="reference")
    dropped = attention(
        q,
        k,
        torch.ones_like(v),
        dropout=0.3,
        dropout_key=random.key(1),
        implementation="reference",
    )
    assert (plain - 1).abs().max() < 1e-12
    assert abs(dropped.mean().item() - 1) < 0.02 and dropped.std() > 0.01


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_without_keys_gives_zeros_and_zero_derivatives(implementation):
    q, k, v = inputs(2, T=3)
    lengths = torch.tensor([0, 7])

    def loss(q, k, v):
        options = {"key_lengths": lengths, "implementation": implementation}
        return attention(q, k, v, **options).square().sum((-1, -2, -3))

    out = attention(q, k, v, key_lengths=lengths, implementation=implementation)
    assert (out[0] == 0).all() and out[1].abs().min() > 0
    x = tuple(x.requires_grad_() for x in (q, k, v))
    first = torch.autograd.grad(loss(*x).sum(), x, create_graph=True)
    for grad in first:
        assert (grad[0] == 0).all() and grad[1].abs().max() > 0
    if implementation != "sdpa":  # torch's fast CPU kernel has no double backward
        for grad in torch.autograd.grad(sum(g.square().sum() for g in first), x):
            assert (grad[0] == 0).all() and grad.isfinite().all()


def test_no_keys_at_all_give_zeros():
    q, k, v = inputs(2, S=0)
    out = attention(q, k, v, implementation="reference")
    assert out.shape == (2, 4, 5, 3) and (out == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"is_causal": True, "window": 2},
        {"window": 3},
        {"key_lengths": torch.tensor([3, 5])},
        {"is_causal": True, "prefix_lengths": torch.tensor([3, 5])},
        {"segment_ids": (torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 1, 2, 2]))},
        {"bias": torch.eye(5, 7, dtype=torch.bool)},
    ],
    ids=lambda options: "-".join(options),
)
def test_only_what_is_visible_moves_the_output(options, implementation):
    q, k, v = inputs(2)
    kinds = {name: value for name, value in options.items() if name != "bias"}
    mask = attention_mask(5, 7, **kinds) & options.get("bias", torch.tensor(True))
    mask = mask.expand(2, 5, 7)
    before = attention(q, k, v, **options, implementation=implementation)
    for j in range(7):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[..., j, :] += 1
        changed_v[..., j, :] += 1
        after = attention(q, changed_k, changed_v, **options, implementation=implementation)
        moved = (after != before).any(-1).any(1)  # (B, T): by any head
        assert torch.equal(moved, mask[..., j])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_grouped_heads_equal_repeated_heads(implementation):
    q, k, v = inputs(2, H=6, G=2)
    repeated = (x.repeat_interleave(3, 1) for x in (k, v))
    torch.testing.assert_close(
        attention(q, k, v, implementation=implementation),
        attention(q, *repeated, implementation=implementation),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reference_errs_no_more_than_torch(dtype):
    q, k, v = inputs(2, H=2, T=33, S=33, K=16, X=16)
    exact = attention(q, k, v, is_causal=True, implementation="reference")
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out = attention(q, k, v, is_causal=True, implementation="reference")
    plain = attention(q, k, v, is_causal=True, implementation="sdpa")
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "cuda"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_implementation_is_right_on_a_gpu(implementation, is_causal, dim):
    q, k, v = (y.to("cuda", torch.bfloat16) for y in inputs(2, T=130, S=300, K=dim, X=dim))
    exact = attention(
        q.double(), k.double(), v.double(), is_causal=is_causal, implementation="reference"
    )
    plain = attention(q, k, v, is_causal=is_causal, implementation="sdpa")
    out = attention(q, k, v, is_causal=is_causal, implementation=implementation)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_reference_is_right_to_second_order_by_finite_differences():
    q, k, v = (x.requires_grad_() for x in inputs(1, H=2, G=1, T=3, S=4, K=2, X=2))
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    key, lengths = random.key(2), torch.tensor([3])

    def f(q, k, v, bias):
        return attention(
            q,
            k,
            v,
            bias=bias,
            is_causal=True,
            key_lengths=lengths,
            softcap=3.0,
            dropout=0.2,
            dropout_key=key,
            implementation="reference",
        )

    assert torch.autograd.gradcheck(f, (q, k, v, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (q, k, v, bias))


def test_compiled_reference_equals_eager():
    q, k, v = inputs(2)
    lengths = torch.tensor([0, 5])

    def loss(q, k, v):
        options = {"is_causal": True, "key_lengths": lengths, "window": 3}
        return attention(q, k, v, **options, implementation="reference").square().sum()

    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(q, k, v), loss(q, k, v))
    grads = torch.func.grad(loss, argnums=(0, 1, 2))
    traced = torch.compile(grads, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(q, k, v), grads(q, k, v))


def test_models_need_no_triton():
    code = "import sys; sys.modules['triton'] = None; import msfs_functional.decoding; "
    code += "import msfs_functional.models.transformer"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ".:kernels"})


BAD = {
    "batch": (lambda q, k, v: (q[:1], k, v), {}, "batch dims"),
    "heads": (lambda q, k, v: (q[:, :3], k, v), {}, "heads"),
    "head_dim": (lambda q, k, v: (q[..., :3], k, v), {}, "head dim"),
    "length": (lambda q, k, v: (q, k, v[..., :3, :]), {}, "length|tokens"),
    "dtype": (lambda q, k, v: (q.float(), k, v), {}, "dtype"),
    "integers": (lambda q, k, v: (q.long(), k.long(), v.long()), {}, "float"),
    "dims": (lambda q, k, v: (q[0, 0], k[0, 0], v[0, 0]), {}, "heads"),
    "window": (None, {"window": 0}, r"window"),
    "softcap": (None, {"softcap": -1.0}, r"softcap"),
    "dropout": (None, {"dropout": 1.0, "dropout_key": random.key(0)}, "dropout"),
    "no_key": (None, {"dropout": 0.1}, "dropout_key"),
    "lengths": (None, {"key_lengths": torch.ones(3, dtype=torch.int64)}, "key_lengths"),
    "segments": (None, {"segment_ids": torch.zeros(2, 5, dtype=torch.int64)}, "segment_ids"),
    "slopes": (None, {"alibi_slopes": torch.ones(3, dtype=torch.float64)}, "alibi_slopes"),
    "bias": (None, {"bias": torch.zeros(2, 4, 5, 6, dtype=torch.float64)}, "bias"),
    "bias_dtype": (None, {"bias": torch.zeros(5, 7, dtype=torch.int64)}, "bias"),
}


@pytest.mark.parametrize(("name", "implementation"), itertools.product(BAD, IMPLEMENTATIONS))
def test_bad_input_is_named(name, implementation):
    change, options, message = BAD[name]
    arguments = inputs(2) if change is None else change(*inputs(2))
    with pytest.raises(ValueError, match=message):
        attention(*arguments, **options, implementation=implementation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 2.0, "implementation": "sdpa"}, "soft-cap"),
        ({"dropout": 0.1, "dropout_key": random.key(0), "implementation": "sdpa"}, "dropout"),
        ({"implementation": "fast"}, "must be one of"),
        ({"window": 2, "implementation": "cuda"}, "window"),
    ],
)
def test_what_an_implementation_lacks_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attention(*inputs(2), **options)
