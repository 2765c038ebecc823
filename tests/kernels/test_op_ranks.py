"""flash_attention on DTensors over two ranks equals one process: sharded by batch, by heads,
replicated.
"""

import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 4, 6, 8), (4, 2, 7, 8), (4, 2, 7, 8), (1, 4, 6, 7)]  # q, k, v, bias
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


OPTIONS = {
    "none": {},
    "padded": {
        "is_causal": True,
        "window": 4,
        "key_lengths": torch.tensor([7, 3, 5, 0]),
        "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64),
        "softcap": 3.0,
    },
    "dropout": {"dropout": 0.3, "dropout_key": torch.tensor([1, 2])},
}


def loss_of(options):
    from msfs_kernels import flash_attention

    def loss(q, k, v, bias):
        return flash_attention(q, k, v, bias=bias, **options).sin().sum()

    return loss


def autograd(f, x):
    x = [y.detach().requires_grad_() for y in x]
    return torch.autograd.grad(f(*x), x)


def double_backward(f, x):
    x = [y.detach().requires_grad_() for y in x]
    grads = torch.autograd.grad(f(*x), x, create_graph=True)
    return torch.autograd.grad(sum((g * g).sum() for g in grads), x)


def derivatives(f, x, t, compiled: bool):
    from torch.func import grad, jvp

    yield "autograd", autograd(f, x)
    yield "func.grad", grad(f, (0, 1, 2, 3))(*x)
    yield "jvp", jvp(f, tuple(x), tuple(t))
    yield "double backward", double_backward(f, x)
    if compiled:
        yield "compiled", autograd(torch.compile(f, fullgraph=True, backend="aot_eager"), x)


def products_with_the_hessian(options, spread_x, spread_t, x, t):
    """jvp of grad is right or, where torch cannot, says so; the remedies give its numbers."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import local_map
    from torch.func import grad, jvp

    f, every = loss_of(options), (0, 1, 2, 3)
    want = jvp(grad(f, every), tuple(x), tuple(t))[1]
    results = [grad(lambda *x: jvp(f, x, tuple(spread_t))[1], every)(*spread_x)]
    try:
        results.append(jvp(grad(f, every), tuple(spread_x), tuple(spread_t))[1])
    except NotImplementedError as problem:
        assert "Take grad of jvp" in str(problem) and "local_map" in str(problem)
    for got in results:
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.full_tensor(), b)

    def of_shards(q, k, v, tq, tk, tv, bias, lengths):
        local = loss_of({**options, "key_lengths": lengths})
        return jvp(grad(lambda *x: local(*x, bias), (0, 1, 2)), (q, k, v), (tq, tk, tv))[1]

    rows, whole = [Shard(0)], [Replicate()]
    mapped = local_map(
        of_shards, out_placements=(rows,) * 3, in_placements=(*(rows,) * 6, whole, rows)
    )
    lengths = distribute_like(options["key_lengths"], spread_x[0])
    got = mapped(*spread_x[:3], *spread_t[:3], spread_x[3], lengths)
    want = jvp(grad(lambda *y: f(*y, x[3]), (0, 1, 2)), tuple(x[:3]), tuple(t[:3]))[1]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.full_tensor(), b)


def distribute_like(x, like):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements)


def mixed_tensors_are_refused(spread, whole):
    from msfs_kernels import flash_attention

    with pytest.raises(ValueError, match="q is a DTensor and k is not"):
        flash_attention(spread, whole, whole)


def compare_on_rank(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120))
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (RANKS,))
    x = inputs()
    t = [y.flip(-1) for y in x]
    for options in OPTIONS.values():
        f = loss_of(options)
        want = dict(derivatives(f, x, t, compiled=False))
        want["compiled"] = want["autograd"]
        for placement in (Shard(0), Shard(1), Replicate()):

            def spread(tensors, placement=placement):
                # The bias has batch size 1.
                own = [placement] * 3 + [Replicate() if placement == Shard(0) else placement]
                pairs = zip(tensors, own, strict=True)
                return [distribute_tensor(y, mesh, [p]) for y, p in pairs]

            torch._dynamo.reset()
            for name, got in derivatives(f, spread(x), spread(t), compiled="window" in options):
                for a, b in zip(got, want[name], strict=True):
                    torch.testing.assert_close(a.full_tensor(), b)
                if name == "autograd":
                    assert got[0].placements == (placement,), f"{placement}: {got[0].placements}"
            if "window" in options and placement == Shard(0):
                products_with_the_hessian(options, spread(x), spread(t), x, t)
    mixed_tensors_are_refused(spread(x)[0], x[1])
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.ranks
def test_two_ranks_equal_one_process():
    mp.spawn(compare_on_rank, (free_port(),), RANKS)
