"""On a GPU: random cases against float64, compiled, exported, inside CUDA graphs, refused."""

import concurrent.futures
import functools

import pytest
import torch
from msfs_kernels import flash_attention
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

pytestmark = pytest.mark.gpu
DEVICE, DTYPE = "cuda", torch.bfloat16


def inputs(T=37, S=70, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped heads; tokens before heads in memory, as projections give them."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(2, tokens, heads, 64, generator=generator).to(DEVICE, DTYPE).transpose(1, 2)
        for tokens, heads in ((T, 4), (S, 2), (S, 2))
    )


def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = flash_attention(q, k, v, is_causal=True, dropout=0.1, dropout_key=KEY.to(q.device))
    return (o * torch.linspace(-1, 1, o.shape[-1], device=o.device)).float().sum()


KEY = torch.tensor([3141, 5926])
CLOSE = dict(rtol=2e-2, atol=2e-2)  # a few roundings of bfloat16


def gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    x = [y.detach().requires_grad_() for y in (q, k, v)]
    return torch.autograd.grad(loss(*x), x)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_options_are_as_exact_as_the_formula(seed, dtype):
    from msfs_kernels.triton_check import failures, random_case

    assert failures(random_case(seed, DEVICE, 200, (dtype,))) == []


def test_the_short_way_past_the_dispatcher_gives_the_ops_bits():
    q, k, v = inputs()
    rest = (None,) * 7 + (False, -1, 0.125, 0.0, 0.0, "ieee", False)
    o, lse = flash_attention(q, k, v, return_lse=True)
    assert all(map(torch.equal, (o, lse), torch.ops.msfs_kernels.attention(q, k, v, *rest)))
    want = grad(loss, (0, 1, 2))(q, k, v)
    assert all(map(torch.equal, gradients(q, k, v), want))


def test_the_driver_starts_what_tritons_launcher_starts():
    """Here and in a thread that has no CUDA context yet."""
    from msfs_kernels import launching

    x = inputs(T=33, S=71, seed=5)
    launching.PREPARED.clear()
    lengths = torch.tensor([70, 23], device=DEVICE)
    call = functools.partial(flash_attention, *x, is_causal=True, key_lengths=lengths)
    first = call()  # by Triton
    (prepared,) = launching.PREPARED.values()
    assert prepared is not None and prepared.direct is not None
    assert torch.equal(call(), first)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(call).result(), first)
    for y in x:
        y.copy_(y.flip(-1))  # q.k stays, v is mirrored
    torch.testing.assert_close(call(), first.flip(-1), **CLOSE)


@pytest.mark.parametrize("causal", [False, True])  # head dim 64: in Gluon on Hopper, and plain
def test_the_driver_moves_maps_of_the_copy_engine_to_other_tensors(causal):
    from msfs_kernels import launching, short

    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the copy engine takes maps since compute capability 9.0")
    x, y = (inputs(T=600, S=700, seed=seed) for seed in range(2))
    want = []
    for z in (x, y):
        short.REPLAYS.clear()
        launching.PREPARED.clear()
        want.append(flash_attention(*z, is_causal=causal))  # by Triton
    (prepared,) = launching.PREPARED.values()
    assert prepared is not None and prepared.direct is not None and prepared.direct.maps
    assert all(
        torch.equal(flash_attention(*z, is_causal=causal), o)
        for z, o in zip((x, y, x), (*want, want[0]), strict=True)
    )
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        call = functools.partial(flash_attention, *y, is_causal=causal)
        assert torch.equal(pool.submit(call).result(), want[1])


@pytest.mark.parametrize("T", [48, 600])  # tiles by pointers, and by the copy engine
def test_the_short_way_tells_tensors_apart_whatever_came_before(T):
    x = inputs(T=T, S=T)
    x = (x[0][:, :2], x[1], x[2])
    tangents = tuple(y.flip(-1) for y in x)
    flash_attention(x[0], x[0], x[0])  # one tensor in three places
    slow = jvp(lambda *y: flash_attention(*y, softcap=1e9), x, tangents)  # goes the long way
    for _ in range(3):
        fast = jvp(flash_attention, x, tangents)
        torch.testing.assert_close((flash_attention(*x), *fast), (slow[0], *slow), **CLOSE)
        leaves = [y.detach().requires_grad_() for y in x]
        got = torch.autograd.grad(flash_attention(*leaves).float().square().sum(), leaves)
        want = grad(lambda *y: flash_attention(*y).float().square().sum(), (0, 1, 2))(*x)
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("place", range(3))
def test_numbers_that_are_not_in_memory_as_they_read_are_right(place):
    """`.imag` of a conjugate holds the negative of what it reads as."""
    plain = [y.float() for y in inputs(T=48, S=48)]
    lazy = list(plain)
    lazy[place] = torch.complex(plain[place], -plain[place]).conj().imag
    assert lazy[place].is_neg() and torch.equal(lazy[place], plain[place])

    def results(x):
        x = tuple(x)
        return flash_attention(*x), *jvp(flash_attention, x, x), *gradients(*x)

    want = results(plain)
    for _ in range(2):  # the second call of a kind goes the short way
        torch.testing.assert_close(results(lazy), want, **CLOSE)


def test_forward_mode_is_the_derivative_of_the_forward():
    q, k, v = (x.float() for x in inputs())
    tangents = tuple(x.flip(-1) for x in (q, k, v))
    _, tangent = jvp(flash_attention, (q, k, v), tangents)
    step = 1e-2
    ahead, behind = (
        flash_attention(*(x + s * t for x, t in zip((q, k, v), tangents, strict=True)))
        for s in (step, -step)
    )
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=2e-3, atol=2e-3)


def test_float32_is_exact_unless_tf32_is_asked_for():
    x = tuple(y.float() for y in inputs(T=300, S=300))
    exact = flash_attention(*(y.double() for y in x))

    def error(precision):
        return float((flash_attention(*x, precision=precision) - exact).abs().max())

    assert error("ieee") < 5e-6 < error("tf32") < 5e-3


def test_float64_passes_gradcheck():
    x = [y[:, :, :6, :8].double().requires_grad_() for y in inputs(T=7, S=9)]
    masks = {"is_causal": True, "window": 4}
    assert torch.autograd.gradcheck(
        lambda *x: flash_attention(*x, **masks), x, check_forward_ad=True, fast_mode=True
    )


def test_compiled_equals_eager():
    x = inputs()
    compiled = torch.compile(gradients_of_func, fullgraph=True)
    torch.testing.assert_close(compiled(*x), gradients_of_func(*x), **CLOSE)
    mapped = torch.compile(vmap(grad(loss)), fullgraph=True)
    stacked = tuple(torch.stack([y, -y]) for y in x)
    torch.testing.assert_close(mapped(*stacked), vmap(grad(loss))(*stacked), **CLOSE)


def gradients_of_func(q: Tensor, k: Tensor, v: Tensor):
    return grad(loss, (0, 1, 2))(q, k, v), jvp(flash_attention, (q, k, v), (q, k, v))


def test_a_cuda_graph_replays_forward_and_backward():
    x = inputs()
    places = [y.clone().requires_grad_() for y in x]
    key = KEY.to(DEVICE)

    def step():
        o = flash_attention(*places, is_causal=True, dropout=0.1, dropout_key=key)
        return o, *torch.autograd.grad(o, places, o.detach())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in (1, 2):
        with torch.no_grad():
            for place, y in zip(places, inputs(seed=seed), strict=True):
                place.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [y.clone() for y in results]
        torch.testing.assert_close(replayed, list(step()), rtol=1e-2, atol=1e-2)  # atomic sums


def test_compiled_into_cuda_graphs():
    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        x = [y.requires_grad_() for y in inputs(seed=seed)]
        got = torch.autograd.grad(compiled(*x), x)
        torch.testing.assert_close(got, gradients(*x), rtol=2e-2, atol=2e-2)


class Block(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        o = flash_attention(q, k, v, is_causal=True, key_lengths=lengths)
        return o.transpose(1, 2).flatten(2) + 1


def test_exported_whole():
    x = (*inputs(), torch.tensor([70, 23], device=DEVICE))
    program = torch.export.export(Block(), x)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.msfs_kernels.attention.default) == 1
    assert torch.equal(program.module()(*x), Block()(*x))


@pytest.mark.parametrize("mode", ["eager", "compiled", "vmap"])
def test_tensors_on_two_devices_are_refused(mode):
    q, k, v = inputs()
    attention = flash_attention
    if mode == "vmap":
        attention = vmap(flash_attention)
    if mode == "compiled":
        attention = torch.compile(flash_attention, fullgraph=True)
    with pytest.raises(ValueError, match="q and k are on different devices"):
        attention(q, k.cpu(), v)


def test_rows_of_wrong_length_are_nan_in_values_and_derivatives():
    q, k, v = (x.requires_grad_() for x in inputs())
    lengths = torch.tensor([71, 70], device=DEVICE)
    o = flash_attention(q, k, v, key_lengths=lengths)
    grads = torch.autograd.grad(o.float().sum(), (q, k, v))
    for x in (o, *grads):
        assert bool(x[0].isnan().all()) and not bool(x[1].isnan().any())


def test_long_rows_need_memory_linear_in_tokens():
    """Second derivatives of 8 heads at 16,384 tokens in a quarter of one float32 T x T."""
    q = torch.randn(1, 8, 16_384, 64, device=DEVICE, dtype=DTYPE)

    def total(q):
        return flash_attention(q, q, q, is_causal=True).float().sin().sum()

    def second():
        return jvp(grad(total), (q,), (q,))

    second()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    second()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 8 * 16_384 * 16_384 * 4 / 4
