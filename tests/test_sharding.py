"""Sharded training on several ranks equals one process; bad degrees and rules are told.

test_ranks.py runs the claims of TWO and FOUR on as many ranks.
"""

import collections
import contextlib
import dataclasses
import functools
import re
import tempfile

import optree
import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from ranks import DEVICE, mesh
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from msfs_functional import (
    agreement,
    context_parallel,
    optim,
    overlap,
    peer_copies,
    random,
    sharding,
    transport,
)
from msfs_functional import vocabulary_parallel as vocabulary
from msfs_functional.attention import attention
from msfs_functional.collectives import psum
from msfs_functional.fsdp import fully_sharded
from msfs_functional.gathering import Sharded, gathered, sharded
from msfs_functional.layers import lookup
from msfs_functional.layouts import DECODER, DECODER_BY_TOKENS, TOWERS, TRANSFORMER
from msfs_functional.losses import cross_entropy, linear_cross_entropy
from msfs_functional.meshes import data_rank, degrees
from msfs_functional.models import decoder as decoders
from msfs_functional.models import decoder_block
from msfs_functional.models.decoder import DecoderConfig, decoder, output_weight
from msfs_functional.models.transformer import TransformerConfig, transformer
from msfs_functional.train import init_state, make_step
from msfs_functional.transforms import hvp, value_and_grad
from msfs_functional.vocabulary_parallel import sharded_linear_cross_entropy

# Vocabulary, hidden units and widths that two and four ranks do not divide.
CONFIG = DecoderConfig(
    29,
    width=18,
    depth=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    hidden=21,
    max_length=16,
    qk_norm=True,
    qkv_bias=True,
    output_bias=True,
)
UNTIED = dataclasses.replace(CONFIG, tied=False, depth=1)
SINGLE = dataclasses.replace(CONFIG, depth=1)
UNNORMED = dataclasses.replace(CONFIG, qk_norm=False, depth=1)
PAIRS = TransformerConfig(29, width=12, depth=1, heads=2, hidden=18, dropout=0.0)
# Without eps Adam inflates gradients that are rounding alone, such as those of a key's bias.
OPTIMIZER, CLIP = optim.adamw(1e-2, eps=1e-3), 0.5
CHAINED = optim.chain(optim.clip_by_global_norm(CLIP), OPTIMIZER)
# On GPUs: each of these small shapes would be float32 kernels of its own to compile.
ATTENTION = "flash" if DEVICE == "cpu" else "reference"
CLOSE = {"rtol": 1e-5, "atol": 2e-6}  # after three steps in float32


def batches(n: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 29, (8, 7), generator=generator).to(DEVICE) for _ in range(n)]


def next_token(model, params, tokens, key):
    """Padding (token 0) makes shares of a batch weigh differently."""
    logits = model.apply(params, tokens[:, :-1], implementation=ATTENTION)
    loss, count = cross_entropy(logits, tokens[:, 1:])
    return loss / count, {"weight": count, "top": logits.amax()}


def translation(model, params, tokens, key):
    logits = model.apply(params, tokens, tokens[:, :-1], implementation=ATTENTION)
    loss, count = cross_entropy(logits, tokens[:, 1:])
    return loss / count, {"weight": count}


def share(tokens: torch.Tensor, on) -> torch.Tensor:
    i, n = data_rank(on)
    return tokens.chunk(n)[i]


def train(loss_fn, params, data, optimizer, **options):
    state = init_state(params, optimizer, random.key(1), ema_decay=0.9)
    options = {"compile": False, "clip_norm": None if optimizer is CHAINED else CLIP, **options}
    step = make_step(loss_fn, optimizer, ema_decay=0.9, **options)
    history = []
    for tokens in data:
        state, metrics = step(state, tokens)
        history.append(torch.stack([metrics["loss"], metrics["grad_norm"]]))
    return state, torch.stack(history)


def by_rank_0(fn):
    """fn's result, a tree of tensors, worked out by one rank for all: cores are few."""

    @functools.cache
    def run(*args, **kwargs):
        found = None
        if agreement.rank() == 0:
            found = optree.tree_map(torch.Tensor.cpu, fn(*args, **kwargs))
        return optree.tree_map(lambda x: x.to(DEVICE), agreement.from_all(found)[0])

    return run


@by_rank_0
def on_one_process(build, config, loss, optimizer, **options):
    """(params, moving average, history) after three steps."""
    model = build(config)
    params = model.init(0, device=DEVICE)
    loss_fn = functools.partial(loss, model)
    state, history = train(loss_fn, params, batches(), optimizer, **options)
    return state.params, state.ema, history


def equal_one_process(
    given,
    build=decoder,
    config=CONFIG,
    layout=DECODER,
    loss=next_token,
    optimizer=None,
    **options,
):
    """Three steps: loss and gradient norm of each, then parameters and their moving average."""
    optimizer = optimizer or OPTIMIZER
    on = mesh(**given)
    accumulation = {k: v for k, v in options.items() if k == "accumulation"}
    params, ema, want = on_one_process(build, config, loss, optimizer, **accumulation)
    model = sharded(build(config), layout, on)
    loss_fn = gathered(functools.partial(loss, model), model)
    if options.pop("own", False):
        options["gradient"] = model.gradient
    data = [share(tokens, on) for tokens in batches()]
    state, got = train(loss_fn, model.init(0), data, optimizer, **options)
    torch.testing.assert_close(got, want, **CLOSE)
    for trees in ((state.params, params), (state.ema, ema)):
        for name, value in sharding.gather(trees[0]).items():
            torch.testing.assert_close(value, trees[1][name], **CLOSE, msg=lambda m, n=name: n + m)
    return state, model


class Largest(TorchDispatchMode):
    """Elements of the largest floating tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not isinstance(out, DTensor) and not out.is_meta:
            if out.is_floating_point() and not func.is_view:
                self.elements = max(self.elements, out.numel())
        return out


# Two ranks.


def shards_are_cut_from_the_unsharded_init():
    for given in ({"dp_shard": 2}, {"tp": 2}, {"dp_replicate": 2}):
        on = mesh(**given)
        for build, config, layout in (
            (decoder, CONFIG, DECODER),
            (transformer, PAIRS, TRANSFORMER),
        ):
            whole = build(config).init(3, device=DEVICE)
            with Largest() as made:
                own = sharded(build(config), layout, on).init(3)
            sizes = [value.to_local().numel() for value in own.values()]
            assert made.elements <= max(sizes), "a rank has made more than its shard"
            cut = sharding.shard(whole, layout.rules, on)
            for name, value in own.items():
                assert value.placements == cut[name].placements
                assert torch.equal(value.to_local(), cut[name].to_local()), name
                assert torch.equal(value.full_tensor(), whole[name]), name


def describe_lists_every_parameter():
    params = sharded(decoder(CONFIG), DECODER, mesh(dp_shard=2)).init(0)
    text = sharding.describe(params)
    assert all(name in text for name in params)
    assert "embedding.weight" in text and "(29, 18)" in text and "dp_shard cuts dim 0" in text


def data_parallel():
    state, _ = equal_one_process({"dp_shard": 2}, optimizer=CHAINED)
    moments = state.opt_state[1][0].mu["embedding.weight"]
    assert isinstance(moments, DTensor) and moments.placements == (Shard(0),)
    assert moments.to_local().numel() < moments.numel()


def replicated_data_parallel():
    state, _ = equal_one_process({"dp_replicate": 2})
    assert state.params["embedding.weight"].placements == (Replicate(),)


def tensor_parallel():
    state, _ = equal_one_process({"tp": 2})
    assert state.params["blocks.0.attention.q.weight"].to_local().shape == (12, 18)


def fused_loss(model, params, tokens, key):
    """With the loss that holds no logits; its options, too."""
    states = model.apply(params, tokens[:, :-1], method="hidden", implementation=ATTENTION)
    loss_of = linear_cross_entropy
    if isinstance(model, Sharded):
        loss_of = sharded_linear_cross_entropy(model.mesh, 29)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    loss, count = loss_of(states, output_weight(params), tokens[:, 1:], **options)
    return loss / count, {"weight": count}


def sequence_parallel():
    """Norms and residuals of a part of the tokens each; a vocabulary that nothing divides."""
    for loss in (next_token, fused_loss):
        equal_one_process({"tp": 2}, layout=DECODER_BY_TOKENS, loss=loss)
    norms, normalize = [], decoder_block.normalize

    def seen(params, name, x, config):
        norms.append(x.shape)
        return normalize(params, name, x, config)

    model = sharded(decoder(UNNORMED), DECODER_BY_TOKENS, mesh(tp=2))
    params, tokens = model.init(0), batches(1)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_block, "normalize", seen)
        patch.setattr(decoders, "normalize", seen)  # the last one
        gathered(functools.partial(next_token, model), model)(params, tokens, random.key(0))
    assert norms == [(8, 3, 18)] * 3
    with pytest.raises(ValueError, match=r"tp \(2\) must divide the tokens of a sequence \(7\)"):
        model.apply(params, tokens)


def vocabulary_parallel():
    equal_one_process({"tp": 2}, loss=fused_loss)
    state, _ = equal_one_process({"tp": 2}, config=UNTIED, loss=fused_loss)
    rank = torch.distributed.get_rank()
    for name in ("embedding.weight", "output.weight"):
        assert state.params[name].to_local().shape == ((15, 14)[rank], 18)


def fused_loss_in_chunks():
    """A chunk of the items at a time, in float64, with a bias, under every transform."""
    group = mesh(tp=2).get_group("tp").group_name
    rank = torch.distributed.get_rank()
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    h, w, b, labels = draw(4, 5, 6), draw(29, 6), draw(29), torch.arange(20).reshape(4, 5)
    options = {"ignore_index": 3, "label_smoothing": 0.1, "z_loss": 0.01}
    rows = slice(0, 15) if rank == 0 else slice(15, 29)
    own = sharded_linear_cross_entropy(mesh(tp=2), 29)

    def whole(h, w, b):
        return cross_entropy(2 * torch.tanh((h @ w.T + b) / 2), labels, **options)[0]

    def part(h, w, b):
        return own(h, w[rows], labels, bias=b[rows], softcap=2.0, **options)[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "CHUNK", {"cpu": 60, "cuda": 60})  # 5 chunks of the 20 items
        torch.testing.assert_close(part(h, w, b), whole(h, w, b))
        for i in range(3):
            want = grad(whole, i)(h, w, b)
            for got in (grad(part, i)(h, w, b), value_and_grad(part, i)(h, w, b)[1]):
                got = got if i == 0 else psum(got, group)  # of its rows, zero elsewhere
                torch.testing.assert_close(got, want)
        tangents = draw(4, 5, 6), draw(29, 6), draw(29)
        want = jvp(lambda *x: grad(whole)(*x), (h, w, b), tangents)
        torch.testing.assert_close(jvp(lambda *x: grad(part)(*x), (h, w, b), tangents), want)
    stray = labels.clone()
    stray[2, 1] = 29  # no rank has it
    assert own(h, w[rows], stray, ignore_index=3)[0].isnan()
    looked_up = vocabulary.lookup(torch.tensor([28, 29, -1, 0]), w[rows], 29, group)
    assert looked_up.isnan().all(1).tolist() == [False, True, True, False]
    torch.testing.assert_close(looked_up[[0, 3]], w[[28, 0]])


def translation_model():
    options = {"build": transformer, "config": PAIRS, "layout": TRANSFORMER, "loss": translation}
    equal_one_process({"dp_shard": 2}, own=True, **options)
    equal_one_process({"tp": 2}, **options)


def accumulated_microbatches():
    equal_one_process({"dp_shard": 2}, accumulation=2)
    for given in ({"dp_shard": 2}, {"tp": 2}):
        equal_one_process(given, accumulation=2, own=True)


class Counted(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def overlapped_gathers_and_sums():
    """Blocks are gathered ahead and their gradients summed behind; in every layout of two ranks."""
    for given in ({"dp_shard": 2}, {"dp_replicate": 2}, {"tp": 2}):
        equal_one_process(given, own=True)
    with pytest.MonkeyPatch.context() as patch:  # what Inductor makes of a block is not the claim
        plain = torch.compile
        patch.setattr(
            torch, "compile", lambda fn, **given: plain(fn, dynamic=False, backend="aot_eager")
        )
        options = {"compile": "regions", "config": UNNORMED, "optimizer": optim.sgd(1e-2)}
        equal_one_process({"dp_shard": 2}, own=True, **options)


def gradients_of_the_output_are_summed_before_those_of_blocks():
    """In the order in which the backward pass has them, the embedding's last."""
    on, seen = mesh(dp_shard=2), []
    config = dataclasses.replace(UNNORMED, tied=False, depth=2)
    model = sharded(decoder(config), DECODER, on)
    loss_fn = gathered(functools.partial(next_token, model), model)
    with pytest.MonkeyPatch.context() as patch:
        plain = overlap.Pipeline._sum

        def sum_(self, use, grads):
            seen.append({re.sub(r"\.[^0-9]*$", "", name) for name in use.unit.names.values()})
            plain(self, use, grads)

        patch.setattr(overlap.Pipeline, "_sum", sum_)
        call = share(batches(1)[0], on), random.key(0)
        model.gradient(loss_fn, model.init(0), [call])
    blocks = [{f"blocks.{i}"} for i in reversed(range(config.depth))]
    assert seen == [{"norm", "output"}, *blocks, {"embedding"}], seen


class SeenByAll:
    """torch's symmetric memory for CPUs: files that the ranks of this machine map."""

    folder = ""

    @staticmethod
    def empty(n, dtype, device):
        """Known by its number: all ranks make the same in the same order."""
        path = SeenByAll.file(len(SeenByAll.made), dist.get_rank())
        SeenByAll.made.append(torch.from_file(path, shared=True, size=n, dtype=dtype).fill_(0.25))
        return SeenByAll.made[-1]

    @staticmethod
    def file(number, rank):
        return f"{SeenByAll.folder}/{number}.{rank}"

    def __init__(self, x, group):
        self.number = [x is y for y in SeenByAll.made].index(True)
        self.group = transport.pg(group)
        self.barrier(0)

    def barrier(self, channel, timeout_ms=0):
        dist.barrier(self.group)

    def get_buffer(self, rank, shape, dtype):
        path = self.file(self.number, dist.get_global_rank(self.group, rank))
        return torch.from_file(path, shared=True, size=shape.numel(), dtype=dtype)


@contextlib.contextmanager
def memory_that_all_see():
    """Copies between ranks work; on CPUs, too."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(peer_copies, "why_not", lambda groups, device: None)
            SeenByAll.folder = agreement.from_all(tempfile.mkdtemp())[0]
            SeenByAll.made = []
            patch.setattr(peer_copies, "symmetric", SeenByAll)
            patch.setattr(SeenByAll, "rendezvous", SeenByAll, raising=False)
        else:
            patch.setenv("LOCAL_WORLD_SIZE", str(dist.get_world_size()))
        yield
    assert peer_copies.shared_bytes() > 0
    peer_copies.forget()


def added_twice(loss_fn, params, tokens, key):
    """What stands outside of blocks is gathered for each time."""
    loss, rest = loss_fn(params, tokens, key)
    return loss + loss_fn(params, tokens, key)[0], rest


def equal_by_copies_and_by_collectives(layout, on, dtype, vocab=CONFIG.vocab, once=True):
    """Two steps, bit for bit: two numbers have one order of adding."""
    plain = decoder(dataclasses.replace(UNNORMED, depth=3, tied=False, vocab=vocab))
    call = share(batches(1)[0], on), random.key(0)
    found = {}
    for how in ("copies", "collectives"):
        model = sharded(plain, layout, on, dtype=dtype, transport=how)
        one, params = functools.partial(next_token, model), model.init(0)
        loss_fn = gathered(one, model) if once else functools.partial(added_twice, one)
        for _ in range(2):
            found[how] = model.gradient(loss_fn, params, [call])
            params = {name: p - found[how][1][name] for name, p in params.items()}
    (mine, grads), (theirs, want) = found.values()
    assert torch.equal(mine[0], theirs[0])
    for name, g in grads.items():
        assert torch.equal(g.to_local(), want[name].to_local()), name


def copies_give_what_collectives_give():
    """Of shards of uneven sizes too; of matrices of a vocabulary that is larger than the blocks,
    in whose memory they are laid, and whose sums come in parts."""
    on = mesh(dp_shard=2)
    with memory_that_all_see():
        equal_by_copies_and_by_collectives(DECODER, on, None)
    with memory_that_all_see(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_copies, "SMALL", 0)
        for once in (True, False):
            equal_by_copies_and_by_collectives(DECODER, on, torch.bfloat16, 301, once)


def copies_of_two_groups_give_what_collectives_give():
    """Matrices of blocks are cut along one axis, the rest along another, but gains not at all."""
    on = mesh(dp_replicate=2, dp_shard=2)
    other: sharding.Cuts = {"dp_replicate": Shard(0)}
    rules = [("norm", {}), (r"blocks.*weight$", {"dp_shard": Shard(0)}), ("", other)]
    with memory_that_all_see():
        layout = dataclasses.replace(DECODER, rules=rules)
        equal_by_copies_and_by_collectives(layout, on, torch.bfloat16)


def copies_are_refused_where_they_cannot_be():
    on = mesh(dp_shard=2)
    group = on.get_group("dp_shard").group_name
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r'"copies": copies are for GPUs, .* of cpu'):
            sharded(decoder(CONFIG), DECODER, on, transport="copies")
        assert sharded(decoder(CONFIG), DECODER, on).transport == "collectives"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_copies, "sees", lambda a, b: False)
        for ranks, said in ((2, "GPU 0 cannot reach the memory of GPU 1"), (1, "on 2 hosts")):
            patch.setenv("LOCAL_WORLD_SIZE", str(ranks))
            assert said in (peer_copies.why_not([group], "cuda") or "")


def products_in_bfloat16_are_summed_in_float32():
    """Over float32 shards; sums in bfloat16, the other choice, come out otherwise."""
    on, plain, tokens = mesh(dp_shard=2), decoder(UNNORMED), share(batches(1)[0], mesh(dp_shard=2))
    labels, group = tokens[:, 1:], on.get_group("dp_shard").group_name
    count = psum((labels != 0).sum().float(), group)

    def own(params):
        params = {name: p.to(torch.bfloat16) for name, p in params.items()}
        return cross_entropy(plain.apply(params, tokens[:, :-1]), labels)[0] / count

    _, mine = value_and_grad(own)(plain.init(0, device=DEVICE))
    want = {name: psum(g, group) for name, g in mine.items()}
    for dtype in (torch.float32, torch.bfloat16):
        model = sharded(plain, DECODER, on, dtype=torch.bfloat16, reduce_dtype=dtype)
        loss_fn = gathered(functools.partial(next_token, model), model)
        call, params = (tokens, random.key(0)), model.init(0)
        found = [value_and_grad(loss_fn, has_aux=True)(params, *call)[1]]
        found.append(model.gradient(loss_fn, params, [call])[1])
        for grads in found:
            assert all(g.dtype == torch.float32 for g in grads.values())
            off = [(grads[n].full_tensor() - g).norm() / g.norm() for n, g in want.items()]
            assert (max(off) < 1e-6) == (dtype == torch.float32), off


def gradients_are_reduced_once_a_step():
    """Four microbatches: each parameter is gathered once and its gradient scattered once."""
    on = mesh(dp_shard=2)
    model = sharded(decoder(CONFIG), DECODER, on)
    loss_fn = gathered(functools.partial(next_token, model), model)
    tokens = share(batches(1)[0], on)
    n = len(model.shapes)
    for gradient, times in ((model.gradient, 1), (None, 4)):
        state = init_state(model.init(0), OPTIMIZER, random.key(1))
        options = {"accumulation": 4, "compile": False}
        step = make_step(loss_fn, OPTIMIZER, gradient=gradient, **options)
        with Counted() as counted:
            step(state, tokens)
        counts = counted.names
        assert counts["reduce_scatter_tensor"] == n * times, counts
        assert counts["all_gather_into_tensor"] >= n * times, counts
        assert counts["all_reduce"] == 5, counts  # a loss for each microbatch, one norm
        if times == 1:
            assert counts["all_gather_into_tensor"] == n, counts


def compiled_step():
    """One graph: equal to one process, and weights are gathered again in the backward."""
    graphs = []

    def keep(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    on = mesh(dp_shard=2)
    one = dataclasses.replace(CONFIG, depth=1, qk_norm=False)
    model = sharded(decoder(one), DECODER, on)
    loss_fn = gathered(functools.partial(next_token, model), model)
    compiled = torch.compile(lambda p, x: loss_fn(p, x, random.key(0))[0], backend=backend)
    params, tokens = model.init(0), batches(1)[0]
    value, grads = value_and_grad(compiled)(params, share(tokens, on))
    whole = decoder(one).init(0)
    want = value_and_grad(lambda p: next_token(decoder(one), p, tokens, None)[0])(whole)
    torch.testing.assert_close(value, want[0])
    for name, gradient in sharding.gather(grads).items():
        torch.testing.assert_close(gradient, want[1][name], **CLOSE)
    gather = torch.ops._c10d_functional.all_gather_into_tensor.default
    scatter = torch.ops._c10d_functional.reduce_scatter_tensor.default
    forward, backward = graphs
    assert forward.count(gather) == backward.count(scatter) == len(params)
    matrices = [name for name in params if params[name].ndim == 2 and "embedding" not in name]
    assert backward.count(gather) >= len(matrices)


def compiled_sequence_parallel_loss():
    on, one = mesh(tp=2), UNNORMED
    model = sharded(decoder(one), DECODER_BY_TOKENS, on)
    loss_fn = gathered(functools.partial(fused_loss, model), model)
    compiled = torch.compile(
        lambda p, x: loss_fn(p, x, random.key(0))[0], backend="aot_eager", fullgraph=True
    )
    params, tokens = model.init(0), batches(1)[0]
    value, grads = value_and_grad(compiled)(params, tokens)
    whole = decoder(one).init(0)
    want = value_and_grad(lambda p: fused_loss(decoder(one), p, tokens, None)[0])(whole)
    torch.testing.assert_close(value, want[0])
    for name, gradient in sharding.gather(grads).items():
        torch.testing.assert_close(gradient, want[1][name], **CLOSE)


def factored_optimizer():
    equal_one_process({"dp_shard": 2}, optimizer=optim.adafactor(1e-2))


def muon_on_every_mesh():
    """Its matrices are whole for the update, however they are cut."""
    muon = optim.muon(1e-2, dtype=torch.float32)
    config = dataclasses.replace(UNNORMED, kv_heads=4)
    for given in ({"tp": 2, "dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 2}, {"tp": 4}):
        state, _ = equal_one_process(given, config=config, optimizer=muon)
        moment = state.opt_state[0][0].mu["blocks.0.attention.q.weight"]
        assert moment.placements == state.params["blocks.0.attention.q.weight"].placements


def fsdp2(build, config, layout, loss, accumulation=1, **given):
    """fully_shard behind the same step: the same losses, gradient norms and parameters."""
    on = mesh(**given)
    params, _, want = on_one_process(build, config, loss, OPTIMIZER, accumulation=accumulation)
    model = fully_sharded(build(config), layout, on)
    loss_fn = gathered(functools.partial(loss, model), model)
    data = [share(tokens, on) for tokens in batches()]
    options = {"accumulation": accumulation, "gradient": model.gradient}
    state, got = train(loss_fn, model.init(0), data, OPTIMIZER, **options)
    torch.testing.assert_close(got, want, **CLOSE)
    for name, value in sharding.gather(state.params).items():
        torch.testing.assert_close(value, params[name], **CLOSE)


def fsdp2_path():
    fsdp2(decoder, CONFIG, DECODER, next_token, accumulation=2, dp_shard=2)
    fsdp2(transformer, PAIRS, TRANSFORMER, translation, dp_shard=2)
    with pytest.raises(ValueError, match="data axes only"):
        fully_sharded(decoder(CONFIG), DECODER, mesh(tp=-1))


def fsdp2_path_on_a_hybrid_mesh():
    fsdp2(decoder, CONFIG, DECODER, next_token, dp_replicate=2, dp_shard=2)


def guard_agrees_on_all_ranks():
    """One rank's loss is infinite: no rank updates."""
    on = mesh(dp_shard=2)
    model = sharded(decoder(CONFIG), DECODER, on)

    def loss_fn(params, tokens, key):
        loss, metrics = next_token(model, params, tokens, key)
        return loss / (0.0 if on.get_local_rank("dp_shard") else 1.0), metrics

    before = {name: p.full_tensor() for name, p in model.init(0).items()}
    state, _ = train(gathered(loss_fn, model), model.init(0), batches(2), OPTIMIZER)
    assert state.skipped == 2
    for name, value in sharding.gather(state.params).items():
        assert torch.equal(value, before[name]), name


def transforms():
    """torch.func over DTensor parameters, in float64: exact to rounding."""
    for given in ({"dp_shard": 2}, {"dp_replicate": 2}, {"tp": 2}):
        transforms_on(mesh(**given), DECODER)
    transforms_on(mesh(tp=2), DECODER_BY_TOKENS)


@by_rank_0
def transforms_of_one_process():
    """Loss, gradient, tangent, Hessian-vector product and each example's gradient."""
    model, tokens, key = decoder(SINGLE), batches(1)[0], random.key(0)
    whole, v = point_and_direction()

    def f(params, tokens=tokens):
        return next_token(model, params, tokens, key)[0]

    each = vmap(grad(lambda p, row: f(p, row[None])), (None, 0))(whole, tokens)
    return f(whole), grad(f)(whole), jvp(f, (whole,), (v,)), hvp(f, whole, v), each


def point_and_direction():
    params, other = (decoder(SINGLE).init(i, dtype=torch.float64) for i in range(2))
    return params, {name: p.cos() * 0.3 for name, p in other.items()}


def transforms_on(on, layout):
    model, tokens, key = sharded(decoder(SINGLE), layout, on), batches(1)[0], random.key(0)
    params, v = (sharding.shard(x, layout.rules, on) for x in point_and_direction())
    sharded_loss = gathered(functools.partial(next_token, model), model)
    loss, gradient, tangent, product, examples = transforms_of_one_process()

    def g(params):
        return sharded_loss(params, share(tokens, on), key)[0]

    def same(got, want):
        for name, value in want.items():
            assert isinstance(got[name], DTensor)
            torch.testing.assert_close(got[name].full_tensor(), value, msg=lambda m, n=name: n + m)

    same(grad(g)(params), gradient)
    value, grads = value_and_grad(g)(params)
    torch.testing.assert_close(value, loss)
    same(grads, gradient)
    torch.testing.assert_close(jvp(g, (params,), (v,)), tangent)
    same(hvp(g, params, v), product)

    # Every rank takes every example, and shares its gradient's shards out.
    each = vmap(grad(lambda p, row: sharded_loss(p, row[None], key)[0]), (None, 0))
    same(each(params, tokens), examples)


def rows_of_a_dtensor_under_torch_func():
    """Where a model is called on DTensors as they are."""
    weight = torch.arange(28.0).view(7, 4).sin()
    (own,) = sharding.shard({"weight": weight}, TOWERS.rules, mesh(dp_shard=2)).values()
    replicated = [Replicate()] * own.device_mesh.ndim
    plain = torch.tensor([[5, 0, 5]])
    ids = distribute_tensor(plain, own.device_mesh, replicated)
    found = grad(lambda w: lookup(w, ids).exp().sum())(own)
    want = grad(lambda w: lookup(w, plain).exp().sum())(weight)
    torch.testing.assert_close(found.full_tensor(), want)


def split_tokens(on, tokens):
    """Inputs, labels, positions and documents of the tokens that this rank holds."""
    rows = share(tokens, on)
    T = rows.shape[1] - 1
    documents = (torch.arange(T, device=DEVICE) // 3).expand(len(rows), T)
    parts = {"tokens": rows[:, :-1], "labels": rows[:, 1:], "documents": documents}
    parts = {name: context_parallel.own_tokens(x, on) for name, x in parts.items()}
    return {
        **parts,
        "positions": context_parallel.own_tokens(torch.arange(T, device=DEVICE), on, dim=0),
    }


def next_of_own(model, attend, packed, params, parts, key):
    documents = parts["documents"] if packed else None
    options = {"positions": parts["positions"], "implementation": attend, "segment_ids": documents}
    logits = model.apply(params, parts["tokens"], **options)
    loss, count = cross_entropy(logits, parts["labels"])
    return loss / count, {"weight": count}


SHORT = DecoderConfig(
    29, width=12, depth=2, heads=2, kv_heads=1, hidden=18, max_length=16, attention_softcap=5.0
)


def longer_batches():
    return [torch.cat([x, x, x[:, :3]], 1) for x in batches()]  # 16 and one to predict


@by_rank_0
def without_context(packed):
    alone = functools.partial(next_of_own, decoder(SHORT), "flash", packed)
    whole = [
        {
            "tokens": x[:, :-1],
            "labels": x[:, 1:],
            "positions": torch.arange(16, device=DEVICE),
            "documents": (torch.arange(16, device=DEVICE) // 3).expand(8, 16),
        }
        for x in longer_batches()
    ]
    state, history = train(alone, decoder(SHORT).init(0, device=DEVICE), whole, OPTIMIZER)
    return state.params, history


def equal_one_process_in_context(packings=(False, True), **given):
    on = mesh(**given)
    for packed in packings:
        params, want = without_context(packed)
        model = sharded(decoder(SHORT), DECODER, on)
        ring = context_parallel.ring_attention(on)
        loss_fn = gathered(functools.partial(next_of_own, model, ring, packed), model)
        parts = [split_tokens(on, x) for x in longer_batches()]
        ours, got = train(loss_fn, model.init(0), parts, OPTIMIZER)
        torch.testing.assert_close(got, want, **CLOSE)
        for name, value in sharding.gather(ours.params).items():
            torch.testing.assert_close(value, params[name], **CLOSE)


def context_parallelism():
    equal_one_process_in_context(cp=2)


def ring_attention_has_every_derivative():
    """Value, gradient, tangent and Hessian-vector product in float64; causal or not."""
    on = mesh(cp=2)
    ring = context_parallel.ring_attention(on)
    group = on.get_group("cp").group_name
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 8, 6), (2, 2, 8, 6), (2, 2, 8, 5)]
    x, t = (
        tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        for _ in range(2)
    )
    for causal in (True, False):

        def f(q, k, v, causal=causal):
            return attention(q, k, v, is_causal=causal).sin().sum().sin()

        def g(q, k, v, causal=causal):
            return psum(ring(q, k, v, is_causal=causal).sin().sum(), group).sin()

        def own(tensors):
            return tuple(context_parallel.own_tokens(y, on, dim=2) for y in tensors)

        every = (0, 1, 2)
        torch.testing.assert_close(g(*own(x)), f(*x))
        torch.testing.assert_close(grad(g, every)(*own(x)), own(grad(f, every)(*x)))
        torch.testing.assert_close(jvp(g, own(x), own(t))[1], jvp(f, x, t)[1])
        want = own(jvp(grad(f, every), x, t)[1])
        torch.testing.assert_close(jvp(grad(g, every), own(x), own(t))[1], want)
        for y in x:
            assert torch.equal(
                context_parallel.all_tokens(context_parallel.own_tokens(y, on, dim=2), on, dim=2), y
            )
    with pytest.raises(ValueError, match="ring attention does not know \\['window'\\]"):
        ring(*own(x), window=3)
    with pytest.raises(ValueError, match=r"2 cp \(4\) must divide the tokens of a sequence \(6\)"):
        context_parallel.own_tokens(torch.zeros(1, 6), on)


TWO = [
    shards_are_cut_from_the_unsharded_init,
    describe_lists_every_parameter,
    data_parallel,
    replicated_data_parallel,
    tensor_parallel,
    sequence_parallel,
    vocabulary_parallel,
    fused_loss_in_chunks,
    translation_model,
    accumulated_microbatches,
    overlapped_gathers_and_sums,
    gradients_of_the_output_are_summed_before_those_of_blocks,
    copies_give_what_collectives_give,
    copies_are_refused_where_they_cannot_be,
    products_in_bfloat16_are_summed_in_float32,
    gradients_are_reduced_once_a_step,
    factored_optimizer,
    guard_agrees_on_all_ranks,
    transforms,
    rows_of_a_dtensor_under_torch_func,
    compiled_step,
    compiled_sequence_parallel_loss,
    fsdp2_path,
    context_parallelism,
    ring_attention_has_every_derivative,
]


GPUS = [
    shards_are_cut_from_the_unsharded_init,
    overlapped_gathers_and_sums,
    copies_give_what_collectives_give,
    context_parallelism,
    vocabulary_parallel,
    sequence_parallel,
    fsdp2_path,
    accumulated_microbatches,
]


# Four ranks.


def shards_of_four_equal_the_unsharded_init():
    for given in ({"dp_shard": 4}, {"tp": 2, "dp_shard": 2}):
        model = sharded(decoder(CONFIG), DECODER, mesh(**given))
        whole = decoder(CONFIG).init(3, device=DEVICE)
        for name, value in sharding.gather(model.init(3)).items():
            assert torch.equal(value, whole[name]), name


def data_parallel_over_four():
    equal_one_process({"dp_shard": -1})


def hybrid():
    equal_one_process({"dp_replicate": 2, "dp_shard": 2}, own=True)


def tensor_and_data_parallel():
    equal_one_process({"tp": 2, "dp_shard": 2})
    options = {"layout": DECODER_BY_TOKENS, "loss": fused_loss}
    equal_one_process({"tp": 2, "dp_shard": 2}, own=True, **options)


def tensor_parallel_that_does_not_divide_heads_is_refused():
    with pytest.raises(ValueError, match=r"tp \(4\) must divide kv_heads \(2\)"):
        sharded(decoder(CONFIG), DECODER, mesh(tp=4))


def context_and_other_parallelism():
    equal_one_process_in_context(cp=2, dp_shard=2, packings=(True,))
    equal_one_process_in_context(cp=-1, packings=(True,))


FOUR = [
    shards_of_four_equal_the_unsharded_init,
    copies_of_two_groups_give_what_collectives_give,
    data_parallel_over_four,
    hybrid,
    tensor_and_data_parallel,
    context_and_other_parallelism,
    muon_on_every_mesh,
    fsdp2_path_on_a_hybrid_mesh,
    tensor_parallel_that_does_not_divide_heads_is_refused,
]


# One process.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dp_shard": 3}, r"dp_shard 3, tp 1, cp 1\) multiply to 3, but 4 processes run"),
        ({"dp_shard": -1, "tp": 3}, r"\(dp_replicate 1, tp 3, cp 1\) .* number of processes \(4\)"),
        ({"dp_shard": -1, "tp": -1}, "only one degree may be -1"),
        ({"tp": 0}, r"tp \(0\) must be at least 1"),
        ({"cp": -2}, r"cp \(-2\) must be at least 1"),
    ],
)
def test_degrees_that_do_not_fit_are_told(given, message):
    with pytest.raises(ValueError, match=message):
        degrees(4, **given)


def test_minus_one_takes_the_ranks_that_remain():
    assert degrees(8, dp_shard=-1, tp=2) == {"dp_replicate": 1, "dp_shard": 4, "tp": 2, "cp": 1}
