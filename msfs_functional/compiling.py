"""How functions are compiled here: whether they can be, for which shapes, as which CUDA graphs."""

import functools
import importlib
import os
import types
from collections.abc import Callable
from shutil import which
from typing import Any, TypeVar

import optree
import torch
from msfs_kernels.dispatch import is_sharded
from torch import Tensor
from torch.fx.experimental import _config
from torch.utils._triton import has_triton

from msfs_functional.transforms import NAMESPACE

S = TypeVar("S")


def inductor_options() -> dict[str, Any]:
    """What differs from Inductor's defaults in a training step."""
    from msfs_functional.epilogues import InTurn, ReluInProducts
    from msfs_functional.gains_at_once import GainsAtOnce
    from msfs_functional.gelu_in_products import GeluInProducts
    from msfs_functional.joined_gradients import GradientsSideBySide
    from msfs_functional.member_layers import MemberLayers
    from msfs_functional.member_sums import MemberSums
    from msfs_functional.tanh_as_sigmoid import TanhAsSigmoid
    from msfs_functional.transposed_products import TransposedProducts

    passes = (
        ReluInProducts(), MemberLayers(), GradientsSideBySide(), TransposedProducts(), MemberSums(),
        GainsAtOnce(), GeluInProducts(),
    )  # fmt: skip
    return {
        # Left on, a layer norm's gradients over input and weights share one kernel that sums in two
        # orders: on an H200, for 32,768 rows of 512, 176 microseconds where two kernels take 81.
        "triton.mix_order_reduction": False,
        "joint_custom_pre_pass": InTurn(*passes),
        "post_grad_custom_pre_pass": TanhAsSigmoid(),
    }


def start_compilers() -> None:
    """Starts Inductor's processes, which take seconds to be there, before there is work for them.

    They compile a GPU's kernels; until they are there the main process compiles alone.
    """
    if torch.cuda.is_available():
        importlib.import_module("torch._inductor.async_compile")


@functools.cache
def prepare_compiler() -> None:
    """Does early what the first compilation for a GPU does once: imports, patterns, processes.

    It takes seconds, in which a program that reads data next has its processes started: a training
    step's first call is sooner done by them.
    """
    if torch.cuda.is_available():
        start_compilers()
        x = torch.ones(16, device="cuda", requires_grad=True)
        torch.compile(lambda x: x * x)(x).sum().backward()


def why_not_compile(device: torch.device | str) -> str | None:
    """Why torch.compile cannot work for this device on this machine; None if it can."""
    kind = torch.device(device).type
    if kind == "cuda" and not has_triton():
        return "Triton is missing or does not support this GPU: pip install triton"
    if kind == "cuda" and not any(map(which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "no C compiler was found, which Triton needs: install gcc or clang, or set CC"
    if kind == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except (exc.InvalidCxxCompiler, RuntimeError):
            return "no C++ compiler was found: install g++ or clang, or name one in CXX"
    return None


def can_compile(device: torch.device | str) -> bool:
    """Whether torch.compile works for this device; `why_not_compile` gives the reason."""
    return why_not_compile(device) is None


def fresh(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of fn with its own code object.

    Dynamo keeps compiled graphs, and counts them against its recompile limit, by code object, which
    all closures of one `def` share: without this the ninth `make_step` of a process would fail.
    """
    code = fn.__code__.replace()
    return types.FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)


def compile_per_shape(fn: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    """fn(params, batch, ...) compiled for batches of many shapes; only the batch's shapes may vary.

    With static graphs each set of shapes gets a callable of its own, so that any number of them
    compiles and a call checks the guards of one graph only. Where shapes are symbols, sizes that
    happen to be equal in one batch (source and target length) stay different symbols.

    Args:
        dynamic: False: one graph for each set of shapes. True: one graph, all sizes are symbols.
            None: a graph for the first shapes, one with symbols for all others.
    """
    graphs: dict[Any, Callable[..., Any]] = {}
    options = inductor_options()

    def run(params: Any, batch: Any, *rest: Any) -> Any:
        leaves = optree.tree_leaves(batch, namespace=NAMESPACE)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in tensors)
        if shapes in graphs:
            return graphs[shapes](params, batch, *rest)
        symbolic = dynamic is True or (dynamic is None and len(graphs) > 0)
        if dynamic is False or not graphs:
            # Left to itself, Dynamo makes sizes symbols that differed in other functions of the
            # same source line: only what is marked here shall be one.
            graph = torch.compile(fresh(fn), fullgraph=True, dynamic=False, options=options)
        else:
            graph = next(iter(graphs.values()))
        graphs[shapes] = graph
        if symbolic:
            for leaf in tensors:
                torch._dynamo.maybe_mark_dynamic(leaf, list(range(leaf.ndim)))
        with _config.patch(use_duck_shape=False):  # pyright: ignore[reportAttributeAccessIssue]
            return graph(params, batch, *rest)

    return run


def graphed(step: Callable[[S, Any], tuple[S, Any]]) -> Callable[[S, Any], tuple[S, Any]]:
    """A donating step on a GPU, replayed as one CUDA graph for each set of batch shapes.

    A replay costs one launch instead of hundreds, which is most of a small model's step. The first
    batch of some shapes runs as it is (and compiles), the second is recorded; all run the same
    kernels on the same numbers. Every batch is copied into the graph's own memory, the first one
    too: tensors of another kind (views, say) would compile anew, which a recording forbids. Metrics
    are copied out; the graphs share one pool. A state in other memory (a restored one) is recorded
    anew. Collectives of NCCL are recorded, too; all ranks then replay together, and must let go of
    the graphs (of what is returned here) before they leave the process group.

    Args:
        step: step(state, batch) -> (state, metrics) that writes the new state into the old one's
            memory, as `train.make_step` makes it.

    Raises:
        ValueError: the state is not on a GPU.
    """
    graphs: dict[Any, tuple[list[Any], torch.cuda.CUDAGraph | None, Any]] = {}  # by shapes
    home: list[int] = []
    pool: Any = None
    last: Any = None  # the same object lies where it lay: looking takes longer than a small replay

    def at_home(state: S) -> None:
        nonlocal home, pool, last
        if state is last:
            return
        last = state
        memory: list[Any] = optree.tree_leaves(state, namespace=NAMESPACE)  # pyright: ignore
        memory = [leaf.to_local() if is_sharded(leaf) else leaf for leaf in memory]
        if elsewhere := {str(leaf.device) for leaf in memory if not leaf.is_cuda}:
            raise ValueError(f"graphed needs a state on a GPU, got one on {sorted(elsewhere)}")
        places = [leaf.data_ptr() for leaf in memory]
        if places != home:
            graphs.clear()
            home, pool = places, torch.cuda.graph_pool_handle()

    def run(state: S, batch: Any) -> tuple[S, Any]:
        at_home(state)
        leaves, spec, *_ = optree.tree_flatten(batch, namespace=NAMESPACE)
        shapes = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        if shapes not in graphs:
            own = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            graphs[shapes] = own, None, None
            return step(state, optree.tree_unflatten(spec, own))
        own, graph, metrics = graphs[shapes]
        for mine, theirs in zip(own, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(theirs, non_blocking=True)
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            # Other threads (a loader's) may go on allocating while this one records.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                _, metrics = step(state, optree.tree_unflatten(spec, own))
            graphs[shapes] = own, graph, metrics
        graph.replay()
        return state, optree.tree_map(torch.clone, metrics, namespace=NAMESPACE)

    return run
