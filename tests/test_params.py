"""Claims of msfs_functional.params."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from msfs_functional import params as P
from msfs_functional import random

RULES = [(r"bias$", P.zeros), (r"norm", P.ones), (r"", P.xavier_uniform())]


class Net(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def encode(self, x, scale=1.0):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return scale * x

    def forward(self, x):
        return self.norm(self.encode(x))


@pytest.fixture(scope="module")
def net():
    return P.functional(Net, RULES)


@pytest.fixture(scope="module")
def params(net):
    return net.init(0, dtype=torch.float64)


def by_hand(params, x):
    for i in range(2):
        x = x + (x @ params[f"layers.{i}.weight"].T + params[f"layers.{i}.bias"]).tanh()
    return x


def test_apply_runs_any_method_with_the_given_parameters(net, params):
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = by_hand(params, x)
    torch.testing.assert_close(net.apply(params, x, method="encode"), expected)
    torch.testing.assert_close(net.apply(params, x, method="encode", scale=2.0), 2 * expected)
    norm = nn.functional.layer_norm(expected, (4,), params["norm.weight"], params["norm.bias"])
    torch.testing.assert_close(net.apply(params, x), norm)


def test_apply_leaves_skeleton_and_params_untouched(net, params):
    before = dict(params)
    net.apply(params, torch.ones(1, 4, dtype=torch.float64))
    assert all(value.is_meta for value in net.skeleton.parameters())
    assert params.keys() == before.keys() and all(params[n] is before[n] for n in params)


def test_skeleton_is_restored_when_the_forward_raises(net, params):
    with pytest.raises(RuntimeError):
        net.apply(params, torch.ones(1, 5, dtype=torch.float64))
    assert all(value.is_meta for value in net.skeleton.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_apply_composes_with_every_transform(net, params, compiled):
    x = torch.randn(3, 4, dtype=torch.float64)

    def loss(params, x):
        return net.apply(params, x, method="encode").square().sum()

    def reference(params, x):
        return by_hand(params, x).square().sum()

    def all_of(f):
        tangents = {name: torch.ones_like(value) for name, value in params.items()}

        def run(params, x):
            slope = jvp(lambda p: f(p, x), (params,), (tangents,))
            curvature = jvp(lambda p: grad(f)(p, x), (params,), (tangents,))
            return grad(f)(params, x), vmap(grad(f), (None, 0))(params, x), slope, curvature

        return run

    expected = all_of(reference)(params, x)
    run = (
        torch.compile(all_of(loss), fullgraph=True, backend="aot_eager")
        if compiled
        else all_of(loss)
    )
    torch.testing.assert_close(run(params, x), expected)


def test_compiled_apply_never_recompiles_for_new_values(net):
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(
        lambda p, x: net.apply(p, x, method="encode"), fullgraph=True, backend=counter
    )
    for seed in range(4):
        params = net.init(seed)
        x = torch.randn(3, 4)
        torch.testing.assert_close(run(params, x), by_hand(params, x))
    assert counter.frame_count == 1


def test_stacked_params_under_vmap_equal_each_member(net):
    members = [net.init(seed) for seed in range(3)]
    x = torch.randn(5, 4)
    together = vmap(net.apply, (0, None))(P.stack(members), x)
    for out, member in zip(together, members, strict=True):
        torch.testing.assert_close(out, net.apply(member, x))
    for there, back in zip(members, P.unstack(P.stack(members)), strict=True):
        assert all(torch.equal(there[name], back[name]) for name in there)


def test_init_under_vmap_over_keys_equals_init_of_each_key(net):
    keys = random.split(random.key(7), 3)
    stacked = vmap(net.init)(keys)
    for key, member in zip(keys, P.unstack(stacked), strict=True):
        alone = net.init(key)
        assert all(torch.equal(alone[name], member[name]) for name in alone)


def test_init_of_a_parameter_depends_on_seed_and_name_only():
    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.layers.insert(0, nn.Linear(4, 4))
            self.extra = nn.Linear(2, 2)

    a, b = P.functional(Net, RULES).init(3), P.functional(Wider, RULES).init(3)
    assert torch.equal(a["layers.1.weight"], b["layers.1.weight"])
    assert not torch.equal(a["layers.0.weight"], a["layers.1.weight"])
    again, other = P.functional(Net, RULES).init(3), P.functional(Net, RULES).init(4)
    assert all(torch.equal(a[name], again[name]) for name in a)
    assert not torch.equal(a["layers.0.weight"], other["layers.0.weight"])


def test_init_places_and_casts(net):
    meta = net.init(0, device="meta", dtype=torch.bfloat16)
    assert all(
        v.is_meta and v.dtype == torch.bfloat16 and not v.requires_grad for v in meta.values()
    )
    assert {name: value.shape for name, value in meta.items()} == net.shapes
    assert P.count(meta) == P.count(net.init(0)) == 2 * (16 + 4) + 2 * 4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.pop("layers.0.bias"), r"missing 'layers.0.bias' \(4,\)"),
        (lambda p: p.update(extra=torch.ones(1)), r"unexpected 'extra'"),
        (
            lambda p: p.update({"norm.bias": torch.ones(5)}),
            r"'norm.bias' has shape \(5,\), expected \(4,\)",
        ),
    ],
)
def test_params_that_do_not_fit_are_named(net, params, change, message):
    wrong = dict(params)
    change(wrong)
    with pytest.raises(ValueError, match=message):
        net.apply(wrong, torch.ones(1, 4, dtype=torch.float64))


def test_first_matching_rule_wins_and_unmatched_names_raise():
    rules = [(r"bias$", 0), (r"^decoder\.", 1), (r"weight", 2)]
    assert P.match(rules, "decoder.bias") == 0
    assert P.match(rules, "decoder.weight") == 1
    assert P.match(rules, "encoder.weight") == 2
    with pytest.raises(ValueError, match=r"no rule matches parameter 'encoder.gain'"):
        P.match(rules, "encoder.gain")


def test_rule_that_matches_nothing_is_a_typo_unless_allowed():
    rules = [(r"biass$", 0), (r"", 1)]
    with pytest.raises(ValueError, match=r"rule 'biass\$' matches none of the 1 parameters"):
        P.by_rules(rules, ["a.bias"])
    assert P.by_rules(rules, ["a.bias"], strict=False) == {"a.bias": 1}


def test_functional_refuses_state_and_hidden_randomness():
    with pytest.raises(ValueError, match="buffer 'running_mean'"):
        P.functional(lambda: nn.BatchNorm1d(3), RULES, strict=False)
    with pytest.raises(ValueError, match=r"random\.dropout"):
        P.functional(lambda: nn.Sequential(nn.Dropout(0.1)), RULES, strict=False)
    with pytest.raises(ValueError, match="no rule matches parameter 'weight'"):
        P.functional(lambda: nn.Linear(2, 2), [(r"bias", P.zeros)])
    with pytest.raises(ValueError, match=r"has no fan.*\(3,\)|\(3,\) has no fan"):
        P.functional(lambda: nn.Linear(2, 3), [(r"", P.xavier_uniform())]).init(0)


def test_tied_parameters_are_one_entry_and_feed_both_places():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    tied = P.functional(Tied, [("", P.normal(1.0))])
    params, x = tied.init(0), torch.randn(2, 3)
    assert list(params) == ["a.weight"]
    torch.testing.assert_close(
        tied.apply(params, x), x @ params["a.weight"].T @ params["a.weight"].T
    )


def test_initialisers_have_their_stated_moments():
    key, shape = random.key(1), (200, 300)
    moments = {
        P.normal(0.5): 0.5,
        P.uniform(0.3): 0.3 / math.sqrt(3),
        P.xavier_uniform(): math.sqrt(2 / 500),
        P.xavier_normal(2.0): 2 * math.sqrt(2 / 500),
        P.kaiming_uniform(): math.sqrt(2 / 300),
        P.kaiming_normal(1.0): math.sqrt(1 / 300),
        P.truncated_normal(0.5): 0.5 * 0.879626,  # std of a standard normal within [-2, 2]
    }
    for initializer, std in moments.items():
        x = initializer(key, shape)
        standard_error = std / math.sqrt(x.numel())
        assert abs(x.mean()) < 5 * standard_error
        assert abs(x.std() - std) < 5 * standard_error
    assert P.truncated_normal(0.5)(key, shape).abs().max() <= 1
    assert P.uniform(0.3)(key, shape).abs().max() <= 0.3
    conv = P.kaiming_normal(1.0)(key, (64, 16, 3, 3))
    assert abs(conv.std() - math.sqrt(1 / (16 * 9))) < 0.004
    assert torch.equal(P.constant(2.5)(key, (2,)), torch.tensor([2.5, 2.5]))


names = st.text("ab.", min_size=1, max_size=6)


@given(st.dictionaries(names, st.integers(1, 4), min_size=1, max_size=8))
def test_split_and_merge_are_inverse(sizes):
    params = {name: torch.full((size,), float(size)) for name, size in sizes.items()}
    selected, rest = P.split(params, [(r"a|b|\.", True)])
    assert selected == params and rest == {}
    chosen = [(r"^a", True), (r"", False)] if any(n[0] == "a" for n in params) else [(r"", False)]
    selected, rest = P.split(params, chosen)
    assert all(name[0] == "a" for name in selected) and all(name[0] != "a" for name in rest)
    assert P.merge(selected, rest) == params


def test_merge_and_stack_refuse_what_does_not_fit():
    a, b = {"w": torch.ones(2)}, {"w": torch.ones(3)}
    with pytest.raises(ValueError, match=r"\['w'\] are in more than one part"):
        P.merge(a, b)
    with pytest.raises(
        ValueError, match=r"'w' has shape \(2,\) in member 0 and \(3,\) in member 1"
    ):
        P.stack([a, b])
    with pytest.raises(ValueError, match=r"differ in the parameters \['v'\]"):
        P.stack([a, {"w": torch.ones(2), "v": torch.ones(1)}])
    with pytest.raises(ValueError, match="at least one member"):
        P.stack([])
    with pytest.raises(ValueError, match="one common leading dim"):
        P.unstack({"w": torch.ones(2), "v": torch.ones(3)})


def test_cast_is_the_same_function_under_every_transform():
    params = {"a": torch.randn(3, 4), "b": torch.randn(5), "n": torch.tensor(3)}
    tangents = {name: torch.randn(params[name].shape) for name in ("a", "b")}

    def loss(cast, a, b):
        low = cast({"a": a, "b": b, "n": params["n"]})
        return (low["a"].square().sum() * low["b"].sin().sum()).float()

    def together(params):
        return P.cast(params, torch.bfloat16)

    def one_by_one(params):
        return {k: v.bfloat16() if v.is_floating_point() else v for k, v in params.items()}

    def answers(cast):
        fn, ab = partial(loss, cast), (params["a"], params["b"])
        leaves = [x.clone().requires_grad_() for x in ab]
        grads = torch.autograd.grad(fn(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(grads[0].square().sum() + grads[1].square().sum(), leaves)
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, ab, tangents.values())
            dual = forward_ad.unpack_dual(fn(*duals)).tangent
        func = torch.func.jvp(torch.func.grad(fn), ab, tuple(tangents.values()))
        mapped = torch.vmap(torch.func.grad(fn), in_dims=(0, None))(torch.stack([ab[0]] * 2), ab[1])
        hessian = torch.func.jacrev(torch.func.grad(fn))(*ab)
        forward = torch.func.grad(lambda a: torch.func.jvp(fn, (a, ab[1]), ab)[1])(ab[0])
        compiled = torch.compile(fn, backend="aot_eager")(*ab)
        unused = torch.autograd.grad(
            cast(dict(zip("ab", leaves, strict=True)))["a"].float().sum(), leaves[0]
        )
        return [*grads, *second, dual, func, mapped, hessian, forward, compiled, *unused]

    torch.testing.assert_close(answers(together), answers(one_by_one), atol=0, rtol=0)


def test_cast_keeps_integers_and_is_differentiable():
    params = {"w": torch.ones(2, requires_grad=True), "n": torch.ones(2, dtype=torch.int64)}
    low = P.cast(params, torch.bfloat16)
    assert low["w"].dtype == torch.bfloat16 and low["n"].dtype == torch.int64
    (slope,) = torch.autograd.grad(low["w"].sum(), [params["w"]])
    assert slope.dtype == torch.float32 and torch.equal(slope, torch.ones(2))
