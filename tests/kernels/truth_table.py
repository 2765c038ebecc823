r"""The truth table: compositions of transforms, eager and compiled, against the fp64 formula.

    python tests/kernels/truth_table.py --device cpu                   # float64 and float32, hours
    python tests/kernels/truth_table.py --device cuda --dtype float32 bfloat16 --workers 15 \
        --options causal padding "grouped heads" window bias dropout --results 0.json --shard 0 4
    python tests/kernels/truth_table.py --composition "jvp(grad)" --options causal --mode compiled
    python tests/kernels/truth_table.py --results runs/truth_table.json       # goes on where it was
    python tests/kernels/truth_table.py --results [0-3].json --seconds 0     # the table of 4 shards
    python tests/kernels/truth_table.py --join CPU=cpu.json GPU=0.json,1.json     # of the README

Rows are compositions, columns modes and dtypes:

    eager            the composition of the op
    forward compiled torch.compile(fullgraph=True) of the attention, transforms around it eager
    compiled         torch.compile(fullgraph=True) of the whole composition

A cell runs every set of options below and holds the largest error of ours over that of the plain
formula in the same dtype (128 roundings at least in float64, 2 in others), both against the plain
formula in float64 on the CPU. It is right when that is at most 2. Where ours and the plain formula
fail in that mode with the same exception and message, numbers and names apart, the cell says `torch
cannot` and a note says why; any other error of ours is `ERROR`.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo.config
import torch._functorch.config
from msfs_kernels import flash_attention
from textbook import textbook
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

B, H, G, T, S, K, N = 2, 4, 2, 5, 6, 4, 3  # N: size of mapped dims


class Case(NamedTuple):
    """Inputs of one cell: x = (q, k, v) or (q, k, v, bias), directions like x, and options."""

    x: tuple[Tensor, ...]
    t: tuple[Tensor, ...]
    u: tuple[Tensor, ...]
    options: dict[str, Any]

    def to(self, device: str, dtype: torch.dtype) -> "Case":
        def move(x):
            if not isinstance(x, Tensor):
                return x
            return x.to(device, dtype) if x.is_floating_point() else x.to(device)

        return pytree.tree_map(move, self)


def options_by_name() -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    lengths, key = torch.tensor([6, 4]), torch.tensor([3141, 5926])
    bias = torch.randn(1, H, T, S, generator=generator, dtype=torch.float64)
    slopes = torch.rand(H, generator=generator, dtype=torch.float64)
    some = {
        "none": {},
        "causal": {"is_causal": True},
        "padding": {"key_lengths": lengths},
        "grouped heads": {"kv_heads": G},
        "window": {"is_causal": True, "window": 2},
        "bias": {"bias": bias},
        "dropout": {"dropout": 0.25, "dropout_key": key},
        "softcap": {"softcap": 2.0},
    }
    everything: dict[str, Any] = {"prefix_lengths": torch.tensor([0, 2]), "alibi_slopes": slopes}
    for options in some.values():
        everything |= options
    everything["segment_ids"] = (torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 0, 1, 1]))
    return {**some, "all": everything}


def make_case(options: dict[str, Any]) -> Case:
    generator = torch.Generator().manual_seed(2)
    options = dict(options)
    kv_heads, bias = options.pop("kv_heads", H), options.pop("bias", None)
    shapes = [(B, H, T, K), (B, kv_heads, S, K), (B, kv_heads, S, K)]
    if bias is not None:
        shapes.append(bias.shape)

    def draw():
        return tuple(
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
        )

    return Case(draw(), draw(), draw(), options)


Attention = Callable[..., Tensor]


def bound(attention: Attention, options: dict[str, Any]) -> Attention:
    """(q, k, v, bias=None, **options that replace those given) -> o"""

    def run(q, k, v, bias=None, **more):
        return attention(q, k, v, bias=bias, **{**options, **more})

    return run


# Compositions: (a, case) -> any pytree of tensors, where a(q, k, v[, bias]) -> o.


def loss_of(a: Attention) -> Attention:
    return lambda *x: a(*x).sin().sum()


def argnums(c: Case) -> tuple[int, ...]:
    return tuple(range(len(c.x)))


def mapped(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([y * (1 - 0.3 * i) for i in range(N)]) for y in x)


def dot(x, y) -> Tensor:
    return sum((a * b).sum() for a, b in zip(x, y, strict=True))  # type: ignore[return-value]


def some_mapped(a: Attention, c: Case):
    q, k = mapped(c.x[:2])
    rest = c.x[1:]
    in_rest = (None,) * len(rest)
    first = vmap(a, in_dims=(0, *in_rest))(q, *rest)
    last = vmap(a, in_dims=(None, 2, *in_rest[1:]), out_dims=1)(c.x[0], k.movedim(0, 2), *rest[1:])
    both = vmap(grad(loss_of(a), argnums(c)), in_dims=(0, *in_rest))(q, *rest)
    return first, last, both


def options_mapped(a: Attention, c: Case):
    """Lengths, keys, segments... mapped together with the inputs."""
    lane = torch.arange(N, device=c.x[0].device)[:, None]
    given = {n: c.options[n][None] + 0 * lane for n in MAPPABLE if n in c.options}
    if "dropout_key" in given:
        given["dropout_key"] = given["dropout_key"] + lane
    if "key_lengths" in given:
        given["key_lengths"] = given["key_lengths"] - lane

    def f(x, given):
        return grad(lambda *x: a(*x, **given).sin().sum(), argnums(c))(*x)

    return vmap(f)(mapped(c.x), given)


MAPPABLE = ("key_lengths", "prefix_lengths", "dropout_key", "alibi_slopes")


def nested_vmap(a: Attention, c: Case):
    x = mapped(c.x)
    xx = tuple(torch.stack([y, y + 0.1], 2) for y in x)
    return vmap(vmap(a, in_dims=1), in_dims=0)(*xx)


def grad_of_vmap(a: Attention, c: Case):
    return grad(lambda *x: vmap(loss_of(a))(*x).sum(), argnums(c))(*mapped(c.x))


def jvp_of(a: Attention, c: Case):
    return jvp(a, c.x, c.t)


def vmap_jvp(a: Attention, c: Case):
    return vmap(lambda t: jvp(a, c.x, t)[1])(mapped(c.t))


def grad_grad(a: Attention, c: Case):
    def g(*x):
        return dot(grad(loss_of(a), argnums(c))(*x), c.t)

    return grad(g, argnums(c))(*c.x)


def jvp_grad(a: Attention, c: Case):
    return jvp(grad(loss_of(a), argnums(c)), c.x, c.t)


def grad_jvp(a: Attention, c: Case):
    return grad(lambda *x: jvp(loss_of(a), x, c.t)[1], argnums(c))(*c.x)


def jvp_jvp(a: Attention, c: Case):
    return jvp(lambda *x: jvp(a, x, c.t)[1], c.x, c.u)


def small_hessian(a: Attention, c: Case, wrt: int = 0):
    """Over the first query (key, value) of the first head: the rest would only repeat it."""
    x = c.x[wrt]

    def f(row):
        full = torch.cat([row[None], x.flatten(0, 2)[1:]]).view(x.shape)
        return loss_of(a)(*c.x[:wrt], full, *c.x[wrt + 1 :])

    return hessian(f)(x.flatten(0, 2)[0])


def vmap_jvp_grad(a: Attention, c: Case):
    return vmap(lambda t: jvp(grad(loss_of(a), argnums(c)), c.x, t)[1])(mapped(c.t))


def vmap_hessian(a: Attention, c: Case):
    def f(row, x):
        return loss_of(a)(torch.cat([row[None], x[0].flatten(0, 2)[1:]]).view(x[0].shape), *x[1:])

    x = mapped(c.x)
    return vmap(hessian(f))(x[0].flatten(1, 3)[:, 0], x)


def linearized(a: Attention, c: Case):
    o, tangent = linearize(a, *c.x)
    return o, tangent(*c.t)


class Block(nn.Module):
    """Attention among linear maps, as a model has it."""

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(K, K, bias=False), nn.Linear(K, K)

    def forward(self, a, q, *rest):
        return self.o(a(self.q(q), *rest)).tanh().sum()


with torch.device("meta"):
    BLOCK = Block()


def through_model(a: Attention, c: Case):
    weights = {
        "q.weight": c.x[0][0, 0, :K],
        "o.weight": c.u[0][0, 1, :K],
        "o.bias": c.u[0][0, 0, 0],
    }
    loss = lambda weights, *x: functional_call(BLOCK, weights, (a, *x))  # noqa: E731
    return grad(loss)(weights, *c.x)


def leaves(c: Case) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in c.x)


def rematerialised(a: Attention, c: Case):
    x = leaves(c)
    loss = checkpoint(lambda *x: loss_of(a)(*x), *x, use_reentrant=False)
    return torch.autograd.grad(loss, x)  # type: ignore[arg-type]


def create_graph(a: Attention, c: Case):
    x = leaves(c)
    first = torch.autograd.grad(loss_of(a)(*x), x, create_graph=True)
    return torch.autograd.grad(dot(first, c.t), x)


def dual_level(a: Attention, c: Case):
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(x, t) for x, t in zip(c.x, c.t, strict=True))
        return tuple(forward_ad.unpack_dual(a(*duals)))


COMPOSITIONS: dict[str, Callable[[Attention, Case], Any]] = {
    "forward": lambda a, c: a(*c.x),
    "grad": lambda a, c: grad(loss_of(a), argnums(c))(*c.x),
    "vmap": lambda a, c: vmap(a)(*mapped(c.x)),
    "vmap(grad)": lambda a, c: vmap(grad(loss_of(a), argnums(c)))(*mapped(c.x)),
    "grad(vmap)": grad_of_vmap,
    "vmap over some arguments": some_mapped,
    "vmap over masks and keys too": options_mapped,
    "nested vmap": nested_vmap,
    "jvp": jvp_of,
    "vmap(jvp)": vmap_jvp,
    "jacrev": lambda a, c: jacrev(lambda *x: a(*x)[0, 1, 2], argnums(c))(*c.x),
    "jacfwd": lambda a, c: jacfwd(lambda q: a(q, *c.x[1:])[0, 1])(c.x[0]),
    "grad(grad)": grad_grad,
    "jvp(grad)": jvp_grad,
    "grad(jvp)": grad_jvp,
    "jvp(jvp)": jvp_jvp,
    "hessian": lambda a, c: [small_hessian(a, c, i) for i in range(3)],
    "vmap(jvp(grad))": vmap_jvp_grad,
    "vmap(hessian)": vmap_hessian,
    "linearize": linearized,
    "functional_call": through_model,
    "checkpoint": rematerialised,
    "autograd.grad, create_graph": create_graph,
    "forward_ad.dual_level": dual_level,
}
MODES = ("eager", "forward compiled", "compiled")


def run(
    attention: Attention, composition: str, case: Case, mode: str = "eager", backend="inductor"
) -> list[Tensor]:
    compose = COMPOSITIONS[composition]
    a = bound(attention, case.options)
    if mode == "forward compiled":
        a = torch.compile(a, fullgraph=True, backend=backend)

    def whole(*inputs):
        return compose(a, Case(*inputs, case.options))

    # AOTAutograd's cache on disk knows a graph by the ops in it, not by the code of their rules.
    torch._functorch.config.enable_autograd_cache = False
    if mode == "compiled":
        if hasattr(torch._dynamo.config, "trace_autograd_ops"):
            torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad within
        whole = torch.compile(whole, fullgraph=True, backend=backend)
    return pytree.tree_leaves(whole(*case[:3]))


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest difference, in units of the largest element of each tensor."""
    assert len(got) == len(want) and len(got) > 0
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape, f"{a.shape} != {b.shape}"
        difference = (a.detach().cpu().double() - b).abs().max()
        worst = max(worst, float(difference / b.abs().max().clamp_min(1e-30)))
        if not bool(torch.isfinite(a).all()):
            return float("inf")
    return worst


def failure(exception: Exception) -> str:
    """Type and first line of the message."""
    return f"{type(exception).__name__}: {exception}".strip().splitlines()[0][:160]


def kind_of(exception: Exception) -> str:
    """The failure without what tells one call from another: numbers, addresses, quoted names."""
    return re.sub(r"0x[0-9a-f]+|\d+|'[^']*'|`[^`]*`|\"[^\"]*\"", "_", failure(exception))


def cell(
    composition: str, name: str, mode: str, device="cpu", dtype=torch.float64, backend="inductor"
) -> tuple[str, float]:
    """("ok" | "WRONG" | "torch cannot" | "ERROR ...", error over that of the plain formula)."""
    case = make_case(options_by_name()[name])
    if composition == "vmap over masks and keys too" and not set(MAPPABLE) & set(case.options):
        return "ok", 0.0
    want = run(textbook, composition, case)
    case = case.to(device, dtype)
    noise = (128 if dtype is torch.float64 else 2) * torch.finfo(dtype).eps
    plain = max(error(run(textbook, composition, case), want), noise)
    torch._dynamo.reset()
    try:
        got = run(flash_attention, composition, case, mode, backend)
    except Exception as ours:
        torch._dynamo.reset()
        try:
            run(textbook, composition, case, mode, backend)
        except Exception as plains:
            if kind_of(plains) == kind_of(ours):
                return f"torch cannot ({failure(ours)})", 0.0
            return f"ERROR {failure(ours)} (the plain formula: {failure(plains)})", float("inf")
        return f"ERROR {failure(ours)}", float("inf")
    ratio = error(got, want) / plain
    return ("ok" if ratio <= 2 else "WRONG"), ratio


Results = dict[str, tuple[str, float]]  # by "mode | dtype | composition | options"


def place(mode: str, dtype: str, composition: str, name: str) -> str:
    return " | ".join((mode, dtype, composition, name))


def text_of(cells: list[tuple[str, float]], asked: int, notes: list[str]) -> str:
    """One cell of the table: the largest ratio, or what is wrong, and over how many of the options
    if not over all; reasons go to the notes. A number in brackets alone is what torch cannot.
    """
    if not cells:
        return ""
    bad = sorted({verdict for verdict, _ in cells if verdict != "ok"})
    if not bad:
        part = "" if len(cells) == asked else f" ({len(cells)} of {asked})"
        return f"{max(ratio for _, ratio in cells):.1f}{part}"
    notes += [verdict for verdict in bad if verdict not in notes]
    numbers = ", ".join(str(notes.index(verdict) + 1) for verdict in bad)
    kinds = sorted({verdict.split(" (")[0].split(":")[0] for verdict in bad} - {"torch cannot"})
    return f"{', '.join(kinds)} [{numbers}]".strip()


SHORT = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class Column(NamedTuple):
    name: str
    results: Results
    mode: str
    dtype: str


def columns_of(results: Results, modes: Iterable[str], dtypes: Iterable[str], of: str = "") -> list:
    return [
        Column(f"{of}{mode} {SHORT[dtype]}", results, mode, dtype)
        for mode in modes
        for dtype in dtypes
    ]


def table(columns: list[Column], options: list[str]) -> str:
    """Markdown: a row a composition, reasons underneath."""
    lines = [
        "| composition | " + " | ".join(column.name for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    notes: list[str] = []
    for composition in COMPOSITIONS:
        row = []
        for _, results, mode, dtype in columns:
            places = (place(mode, dtype, composition, name) for name in options)
            row.append(
                text_of([results[at] for at in places if at in results], len(options), notes)
            )
        if any(row):
            lines.append(f"| {composition} | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *(f"[{i}] {note}  " for i, note in enumerate(notes, 1))])


def read(paths: Iterable[Path]) -> Results:
    """The cells of all these files that exist."""
    results: Results = {}
    for path in paths:
        if path.exists():
            results |= {at: tuple(cell) for at, cell in json.loads(path.read_text()).items()}
    return results


def joined(sides: list[str], modes: list[str], options: list[str]) -> str:
    """One table of several machines' results, each "NAME=FILE,FILE": what the README shows."""
    columns: list[Column] = []
    for side in sides:
        name, files = side.split("=", 1)
        results = read(Path(file) for file in files.split(","))
        if not results:
            raise SystemExit(f"no cells in {files}: make them with --results")
        found = {tuple(at.split(" | ")[:2]) for at in results}
        for column in columns_of(results, modes, SHORT, f"{name} "):
            if (column.mode, column.dtype) in found:
                columns.append(column)
    return table(columns, options)


Job = tuple[str, str, str, str]  # mode, dtype, composition, options


def run_cell(job: Job, device: str, backend: str, deadline: float) -> Results:
    """The cell, or nothing after the deadline."""
    if time.monotonic() > deadline:
        return {}
    torch.set_num_threads(1)
    mode, dtype, composition, name = job
    verdict, ratio = cell(composition, name, mode, device, getattr(torch, dtype), backend)
    if verdict != "ok":
        print(f"{place(*job)}: {verdict} {ratio:.1f}", file=sys.stderr, flush=True)
    return {place(*job): (verdict, ratio)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="*", default=["float64", "float32"])
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--composition", nargs="*", default=list(COMPOSITIONS))
    parser.add_argument("--options", nargs="*", default=list(options_by_name()))
    parser.add_argument("--mode", nargs="*", default=list(MODES))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this many")
    parser.add_argument("--workers", type=int, default=1, help="processes; a GPU compiles on all")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[],
        help="JSON of cells: those in any of the files are not rerun, the first is written",
    )  # fmt: skip
    parser.add_argument(
        "--shard", type=int, nargs=2, default=(0, 1), metavar=("I", "N"),
        help="every Nth cell from the Ith on, so that N machines share a table",
    )  # fmt: skip
    parser.add_argument(
        "--join", nargs="+", metavar="NAME=FILE,FILE", help="only prints these files as one table"
    )
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    args = parser.parse_args()
    if args.join:
        print(joined(args.join, args.mode, args.options))
        return
    results = read(args.results)

    def keep(found: Results) -> None:
        results.update(found)
        if args.results and found:
            args.results[0].parent.mkdir(parents=True, exist_ok=True)
            args.results[0].write_text(json.dumps(results, indent=0))

    deadline = time.monotonic() + args.seconds
    asked: list[Job] = [
        (mode, dtype, composition, name)
        for mode in args.mode
        for dtype in args.dtype
        for composition in args.composition
        for name in args.options
    ]
    first, step = args.shard
    jobs = [job for job in asked[first::step] if place(*job) not in results]
    if args.workers == 1:
        for job in jobs:
            keep(run_cell(job, args.device, args.backend, deadline))
    elif args.seconds > 0:  # forked before CUDA starts, each with the imports and its own context
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            rest = (args.device, args.backend, deadline)
            running = [pool.submit(run_cell, job, *rest) for job in jobs]
            for future in concurrent.futures.as_completed(running):
                keep(future.result())
    done = [results[place(*job)] for job in asked if place(*job) in results]
    wrong = sum(v != "ok" and not v.startswith("torch cannot") for v, _ in done)
    text = (
        f"torch {torch.__version__}, {args.device}, compiled by {args.backend};"
        f" options: {', '.join(args.options)}; {len(done)} of {len(asked)} cells, {wrong} wrong\n\n"
        + table(columns_of(results, args.mode, args.dtype), args.options)
    )
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
