"""Decoding as pure steps over a cache: greedy, sampling, beam search, and ensembles of models.

A model takes part through one function, and nothing else is known of it:

    step_fn(tokens (N,), cache, position) -> (logits (N, V), cache)

Every search is a few updates of a state of fixed shapes, `state -> state`, so one compiled graph
serves all tokens. `run_eager` calls them in a loop; a `Compiled` runner compiles them, on CUDA into
one CUDA graph a token, and looks only every few tokens whether all sentences have ended (a look
makes the CPU wait for the GPU).

Dimension key: N rows (hypotheses), B sentences, R beams (N = B R), V vocabulary, L tokens at most,
M members of an ensemble.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import optree
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from msfs_functional import random

StepFn = Callable[[Tensor, Any, Tensor], tuple[Tensor, Any]]
ReorderFn = Callable[[Any, Tensor], Any]
Updates = tuple[Callable[[Any], Any], ...]  # what makes one more token, in order


class Hypotheses(NamedTuple):
    """What a search returns: (N,) leading dims for greedy and sample, (B, n) for beam search."""

    tokens: Int64[Tensor, "... L"]  # without BOS, with EOS, then padding
    lengths: Int64[Tensor, "..."]  # tokens, EOS included; 0 marks a hypothesis never found
    scores: Float[Tensor, "..."]  # log-probability in nats; in beam search normalised by length


class Runner(Protocol):
    """Applies all `updates` to `state` up to `steps` times, stopping early once `state.done`."""

    def __call__(self, updates: Updates, state: Any, steps: int) -> Any: ...


def run_eager(updates: Updates, state: Any, steps: int) -> Any:
    """The plain loop, asking after every token whether all is done."""
    with torch.no_grad():
        for _ in range(steps):
            for update in updates:
                state = update(state)
            if state.done:
                break
    return state


class Compiled:
    """A runner that compiles the updates once for each step_fn, options and shapes, and keeps them.

    On CUDA each token is then one launch of a CUDA graph, which reads the tensors that `step_fn`
    closed over when it was first seen: parameters updated in place are seen, replaced ones are not
    (make a new step_fn). Hold on to both the runner and the step_fn, or each call compiles again.

    Args:
        check_every: tokens between two looks at `state.done`.
        keep: searches that are kept compiled, with the tensors of their state; the oldest go first.
        compile: False only records CUDA graphs, of the kernels that eager decoding runs: less fast,
            and ready at once, for searches of many shapes.
    """

    def __init__(self, check_every: int = 8, keep: int = 32, compile: bool = True):
        if min(check_every, keep) < 1:
            raise ValueError(f"check_every ({check_every}) and keep ({keep}) must be at least 1")
        self.check_every, self.keep, self.compile = check_every, keep, compile
        self._kept: dict[Any, tuple[Any, Callable[[], None]]] = {}

    def __call__(self, updates: Updates, state: Any, steps: int) -> Any:
        leaves = optree.tree_leaves(state)
        shapes = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
        key = (updates, optree.tree_structure(state), shapes)
        with torch.no_grad():
            if key not in self._kept:
                own = optree.tree_map(lambda x: x.clone(), state)
                self._kept[key] = own, _donating(updates, own, self.compile)
                if len(self._kept) > self.keep:
                    del self._kept[next(iter(self._kept))]
            own, advance = self._kept[key]
            for old, new in zip(optree.tree_leaves(own), leaves, strict=True):
                old.copy_(new)
            for i in range(steps):
                advance()
                if (i + 1) % self.check_every == 0 and own.done:
                    break
            return optree.tree_map(lambda x: x.clone(), own)


def _donating(updates: Updates, state: Any, compile: bool) -> Callable[[], None]:
    """`state[...] = update(state)`, compiled, for every update; on CUDA the replay of their graph.

    Each is compiled by itself: in one graph, Inductor fuses a write into a cache, a gather from it
    and the copy back, and reads what it has just overwritten (pytorch #198270; 2.11 to 2.15).
    """

    def donating(update: Callable[[Any], Any]) -> Callable[[Any], None]:
        def write(state: Any) -> None:
            new = update(state)
            for old, value in zip(optree.tree_leaves(state), optree.tree_leaves(new), strict=True):
                if old is not value:
                    old.copy_(value)

        return torch.compile(write, fullgraph=True, dynamic=False) if compile else write

    compiled = [donating(update) for update in updates]

    def advance() -> None:
        # Every search, shape and model is a graph of the same code: not the mistake that torch's
        # default limit of 8 recompilations is there to catch.
        with torch._dynamo.config.patch(recompile_limit=256):
            for write in compiled:
                write(state)

    if optree.tree_leaves(state)[0].device.type != "cuda":
        return advance
    start = optree.tree_map(lambda x: x.clone(), state)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # behind the copies, or it reads half of them
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and lets libraries allocate their workspaces
            optree.tree_map_(lambda x, y: x.copy_(y), state, start)
            advance()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance()
    return graph.replay


def gather_rows(cache: Any, rows: Int64[Tensor, "N"]) -> Any:
    """The cache whose row n continues row rows[n]; every leaf has its rows in dim 0."""
    return optree.tree_map(lambda x: x.index_select(0, rows), cache)


def ensemble_step(step_fn: Callable[..., tuple[Tensor, Any]], params: Any) -> StepFn:
    """Members decode as one: log of the mean of their probabilities, from stacked parameters.

    Args:
        step_fn: (params, tokens, cache, position) -> (logits, cache) of one member.
        params: stacked parameters, M in dim 0 of each leaf; caches are stacked likewise.
    """

    def step(tokens: Tensor, cache: Any, position: Tensor) -> tuple[Tensor, Any]:
        members = torch.vmap(step_fn, in_dims=(0, None, 0, None))
        logits, cache = members(params, tokens, cache, position)
        return _log_mean(logits.float().log_softmax(-1)), cache

    return step


def ensemble_reorder(reorder_fn: ReorderFn = gather_rows) -> ReorderFn:
    """`reorder_fn` for the stacked caches of `ensemble_step`."""
    return torch.vmap(reorder_fn, in_dims=(0, None))


def average_steps(step_fns: Sequence[StepFn]) -> StepFn:
    """`ensemble_step` for members of different kinds; the cache is a tuple of their caches."""

    def step(tokens: Tensor, cache: Any, position: Tensor) -> tuple[Tensor, Any]:
        pairs = [f(tokens, c, position) for f, c in zip(step_fns, cache, strict=True)]
        logps = torch.stack([logits.float().log_softmax(-1) for logits, _ in pairs])
        return _log_mean(logps), tuple(cache for _, cache in pairs)

    return step


def _log_mean(logps: Float[Tensor, "M N V"]) -> Float[Tensor, "N V"]:
    return logps.logsumexp(0) - math.log(logps.shape[0])


def keep_top_k(logits: Float[Tensor, "... V"], k: int) -> Float[Tensor, "... V"]:
    """-inf for all but the k largest (and what ties with the last of them) (Fan et al. 2018)."""
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits: Float[Tensor, "... V"], p: float) -> Float[Tensor, "... V"]:
    """-inf outside the nucleus: the fewest tokens that hold p together (Holtzman et al. 2020)."""
    ordered, index = logits.sort(descending=True)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs  # the most probable token always stays
    kept = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before < p)
    return logits.masked_fill(~kept, -math.inf)


def keep_min_p(logits: Float[Tensor, "... V"], p: float) -> Float[Tensor, "... V"]:
    """-inf where a token is less than p times as probable as the best one (Nguyen et al. 2024)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


class RowState(NamedTuple):
    """State of greedy decoding and sampling: every row on its own."""

    cache: Any
    last: Int64[Tensor, "N"]  # token that enters next
    tokens: Int64[Tensor, "N L"]
    lengths: Int64[Tensor, "N"]
    logps: Float[Tensor, "N"]
    ended: Bool[Tensor, "N"]
    count: Int64[Tensor, ""]  # tokens made so far
    position: Int64[Tensor, ""]  # of `last`
    key: Int64[Tensor, "2"]
    done: Bool[Tensor, ""]


@dataclass(frozen=True)
class RowUpdate:
    """One more token for every row: the most probable one, or one drawn at a temperature."""

    step_fn: StepFn
    eos: int
    pad: int
    temperature: float = 0.0  # 0 is greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    banned: tuple[int, ...] = ()

    def __call__(self, s: RowState) -> RowState:
        logits, cache = self.step_fn(s.last, s.cache, s.position)
        logits = logits.float()
        lse = logits.logsumexp(-1)
        allowed = _ban(logits, self.banned)
        token = allowed.argmax(-1) if self.temperature == 0 else self.draw(allowed, s)
        logp = logits.gather(-1, token[:, None])[:, 0] - lse
        token = torch.where(s.ended, self.pad, token)
        ended = s.ended | (token == self.eos)
        return RowState(
            cache=cache,
            last=token,
            tokens=s.tokens.index_copy(1, s.count[None], token[:, None]),
            lengths=s.lengths + ~s.ended,
            logps=s.logps + torch.where(s.ended, 0.0, logp),
            ended=ended,
            count=s.count + 1,
            position=s.position + 1,
            key=s.key,
            done=ended.all(),
        )

    def draw(self, logits: Float[Tensor, "N V"], s: RowState) -> Int64[Tensor, "N"]:
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        return random.categorical(random.fold_in(s.key, s.count), logits)


def sample(
    step_fn: StepFn,
    cache: Any,
    key: Int64[Tensor, "2"],
    *,
    batch: int,
    max_length: int,
    bos: int | Int64[Tensor, "N"],
    eos: int,
    pad: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    banned: Sequence[int] = (),
    position: int = 0,
    runner: Runner = run_eager,
) -> Hypotheses:
    """Tokens drawn from softmax(logits / temperature), cut by top-k, then top-p, then min-p.

    Args:
        step_fn, cache: the model and where it starts; see the head of this file.
        key: the same key draws the same tokens, eager or compiled.
        batch: N, rows.
        max_length: tokens to make at most, EOS included.
        bos: the token to start from, or one for each row (the last of a prompt).
        eos, pad: the token that ends a row, and what fills it up after.
        temperature: positive; below 1 sharpens, 0 is `greedy`.
        top_k: candidates to keep, at least 1.
        top_p: probability in (0, 1] that the kept candidates hold.
        min_p: in (0, 1]; least probability kept, as a share of the largest.
        banned: tokens never made.
        position: of `bos` in the cache (a prompt's length - 1).
        runner: `run_eager`, or a `Compiled` that you keep.

    Returns:
        Hypotheses of (N,) rows; scores are log-probabilities under the model itself, at
        temperature 1 and nothing cut.

    Raises:
        ValueError: an option out of range.
    """
    if temperature < 0:
        raise ValueError(f"temperature ({temperature}) must not be negative; 0 is greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k ({top_k}) must be at least 1 candidate; None keeps all")
    for name, p in (("top_p", top_p), ("min_p", min_p)):
        if p is not None and not 0 < p <= 1:
            raise ValueError(f"{name} ({p}) must be in (0, 1]; None keeps all")
    _validate(batch, max_length)
    first = torch.as_tensor(bos, device=key.device).expand(batch)
    zeros = torch.zeros_like(first)
    state = RowState(
        cache=cache,
        last=first,
        tokens=torch.full((batch, max_length), pad, device=key.device),
        lengths=zeros,
        logps=zeros.float(),
        ended=zeros.bool(),
        count=zeros.new_tensor(0),
        position=zeros.new_tensor(position),
        key=key,
        done=zeros.new_tensor(False, dtype=torch.bool),
    )
    update = RowUpdate(step_fn, eos, pad, temperature, top_k, top_p, min_p, tuple(banned))
    state = runner((update,), state, max_length)
    return Hypotheses(state.tokens, state.lengths, state.logps)


def greedy(
    step_fn: StepFn,
    cache: Any,
    *,
    batch: int,
    max_length: int,
    bos: int | Int64[Tensor, "N"],
    eos: int,
    pad: int = 0,
    banned: Sequence[int] = (),
    position: int = 0,
    runner: Runner = run_eager,
) -> Hypotheses:
    """The most probable token at every step; arguments as in `sample`."""
    device = optree.tree_leaves(cache)[0].device
    return sample(
        step_fn,
        cache,
        random.key(0).to(device),
        batch=batch,
        max_length=max_length,
        bos=bos,
        eos=eos,
        pad=pad,
        temperature=0.0,
        banned=banned,
        position=position,
        runner=runner,
    )


class BeamState(NamedTuple):
    """State of beam search: R running hypotheses of each sentence and the R best that ended."""

    cache: Any
    rows: Int64[Tensor, "N"]  # that the hypotheses continue
    last: Int64[Tensor, "B R"]
    tokens: Int64[Tensor, "B R L"]
    scores: Float[Tensor, "B R"]  # summed log-probabilities, best first
    ended_tokens: Int64[Tensor, "B R L"]
    ended_lengths: Int64[Tensor, "B R"]
    ended_scores: Float[Tensor, "B R"]  # normalised by length, best first, -inf where none yet
    open: Bool[Tensor, "B"]  # sentences that may still improve
    count: Int64[Tensor, ""]
    position: Int64[Tensor, ""]
    done: Bool[Tensor, ""]


@dataclass(frozen=True)
class BeamExtend:
    """One more token for every hypothesis, keeping the best R that run and the best R that ended.

    Step for step what transformers' generate does, so that hypotheses are equal.
    """

    step_fn: StepFn
    max_length: int
    eos: int
    length_penalty: float
    length_norm: Literal["power", "gnmt"]
    early_stopping: bool | Literal["never"]
    force_eos: bool
    banned: tuple[int, ...]

    def norm(self, length: Tensor | int) -> Tensor | float:
        """What a sum of `length` log-probabilities is divided by."""
        if self.length_norm == "gnmt":
            return ((5 + length) / 6) ** self.length_penalty
        return length**self.length_penalty

    def __call__(self, s: BeamState) -> BeamState:
        B, R, _ = s.tokens.shape
        logits, cache = self.step_fn(s.last.reshape(-1), s.cache, s.position)
        logits = logits.float()
        count = s.count + 1
        last_chance = count == self.max_length
        lse = logits.logsumexp(-1, keepdim=True)
        logits = _ban(logits, self.banned)
        if self.force_eos:
            others = torch.arange(logits.shape[-1], device=logits.device) != self.eos
            forced = torch.where(others, -math.inf, lse)
            logits = torch.where(last_chance, forced, logits)

        # 2 R candidates: at most R of them end, which leaves R to go on with. The 2 R best of all
        # R V are among the 2 R best of each hypothesis.
        values, ids = _top_k(logits, min(2 * R, logits.shape[-1]))
        K = values.shape[-1]
        candidates = (s.scores.reshape(-1, 1) + values - lse).reshape(B, R * K)
        best, flat = candidates.topk(2 * R)
        parent, token = flat // K, ids.reshape(B, R * K).gather(1, flat)
        tokens = _gather_beams(s.tokens, parent)
        tokens = tokens.index_copy(2, s.count[None], token[..., None])
        ends = (token == self.eos) | last_chance

        scores, pick = torch.where(ends, -math.inf, best).topk(R)
        rows = parent.gather(1, pick) + R * torch.arange(B, device=pick.device)[:, None]

        # A hypothesis that ends counts only among the R best candidates, in an open sentence.
        counts = ends & s.open[:, None] & best.isfinite()
        counts = counts & (torch.arange(2 * R, device=pick.device) < R)
        if self.early_stopping is True:
            counts = counts & ~s.ended_scores.isfinite().all(1, keepdim=True)
        new_scores = torch.where(counts, best / self.norm(count), -math.inf)
        ended_scores, kept = torch.cat([s.ended_scores, new_scores], 1).topk(R)
        lengths = torch.cat([s.ended_lengths, count.expand(B, 2 * R)], 1).gather(1, kept)

        # The best running hypothesis can at best keep its sum: does that beat the worst that ended?
        farthest = self.early_stopping == "never" and self.length_penalty > 0
        bound = scores[:, 0] / self.norm(self.max_length if farthest else count)
        still_open = s.open & (bound > ended_scores[:, -1])
        done = ~still_open.any()
        if self.early_stopping is True:
            done = done | ended_scores.isfinite().all()
        return BeamState(
            cache=cache,
            rows=rows.reshape(-1),
            last=token.gather(1, pick),
            tokens=_gather_beams(tokens, pick),
            scores=scores,
            ended_tokens=_gather_beams(torch.cat([s.ended_tokens, tokens], 1), kept),
            ended_lengths=torch.where(ended_scores.isfinite(), lengths, 0),
            ended_scores=ended_scores,
            open=still_open,
            count=count,
            position=s.position + 1,
            done=done,
        )


@dataclass(frozen=True)
class BeamReorder:
    """The cache follows the hypotheses that were chosen."""

    reorder_fn: ReorderFn

    def __call__(self, s: BeamState) -> BeamState:
        return s._replace(cache=self.reorder_fn(s.cache, s.rows))


def beam_search(
    step_fn: StepFn,
    cache: Any,
    *,
    batch: int,
    beams: int,
    max_length: int,
    bos: int | Int64[Tensor, "B"],
    eos: int,
    pad: int = 0,
    length_penalty: float = 1.0,
    length_norm: Literal["power", "gnmt"] = "power",
    early_stopping: bool | Literal["never"] = False,
    force_eos: bool = False,
    banned: Sequence[int] = (),
    n_best: int = 1,
    position: int = 0,
    reorder_fn: ReorderFn = gather_rows,
    runner: Runner = run_eager,
) -> Hypotheses:
    """The most probable sequences found by keeping `beams` hypotheses of each sentence.

    Args:
        step_fn, cache: see the head of this file; rows are grouped by sentence, hypothesis r of
            sentence b is row b R + r.
        batch, beams: B sentences, R hypotheses of each.
        max_length: tokens to make at most, EOS included; what has not ended by then ends there.
        bos: the token to start from, or one for each sentence.
        length_penalty, length_norm: a hypothesis of `length` tokens scores log p / norm(length);
            "power": length ** penalty (1 is the mean); "gnmt": ((5 + length) / 6) ** penalty
            (Wu et al. 2016, equation 14). 0 scores log p itself.
        early_stopping: False stops a sentence when its best running hypothesis, normalised at its
            present length, is worse than the worst of R that ended; "never" normalises at
            max_length instead (exact for a positive penalty); True stops when R have ended.
        force_eos: the last token is EOS, at no cost.
        banned: tokens never made.
        n_best: hypotheses to return, at most `beams`.
        position: of `bos` in the cache.
        reorder_fn: (cache, rows) -> the cache in which row n continues row rows[n].
        runner: `run_eager`, or a `Compiled` that you keep.

    Returns:
        Hypotheses of (B, n_best), best first.

    Raises:
        ValueError: an option out of range.
    """
    _validate(batch, max_length)
    if beams < 1:
        raise ValueError(f"beams ({beams}) must be at least 1 hypothesis")
    if not 1 <= n_best <= beams:
        raise ValueError(f"n_best ({n_best}) must be from 1 to beams ({beams}); use more beams")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping ({early_stopping!r}) must be True, False or 'never'")
    if length_norm not in ("power", "gnmt"):
        raise ValueError(f"length_norm ({length_norm!r}) must be 'power' or 'gnmt'")
    device = optree.tree_leaves(cache)[0].device
    first = torch.as_tensor(bos, device=device).reshape(-1, 1).expand(batch, beams)
    tokens = torch.full((batch, beams, max_length), pad, device=device)
    none = torch.full((batch, beams), -math.inf, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    state = BeamState(
        cache=cache,
        rows=torch.arange(batch * beams, device=device),
        last=first,
        tokens=tokens,
        scores=none.index_fill(1, zero, 0.0),  # all begin alike: only the first may branch
        ended_tokens=tokens,
        ended_lengths=torch.zeros_like(first),
        ended_scores=none,
        open=torch.ones(batch, dtype=torch.bool, device=device),
        count=zero,
        position=zero + position,
        done=zero.bool(),
    )
    extend = BeamExtend(
        step_fn,
        max_length,
        eos,
        length_penalty,
        length_norm,
        early_stopping,
        force_eos,
        tuple(banned),
    )
    state = runner((extend, BeamReorder(reorder_fn)), state, max_length)
    best = (state.ended_tokens, state.ended_lengths, state.ended_scores)
    return Hypotheses(*(x[:, :n_best] for x in best))


def _gather_beams(x: Int64[Tensor, "B R L"], beams: Int64[Tensor, "B n"]) -> Tensor:
    return x.gather(1, beams[..., None].expand(-1, -1, x.shape[2]))


def _ban(logits: Float[Tensor, "N V"], banned: tuple[int, ...]) -> Float[Tensor, "N V"]:
    ids = torch.arange(logits.shape[-1], device=logits.device)
    for token in banned:
        logits = torch.where(ids == token, -math.inf, logits)
    return logits


def _top_k(x: Float[Tensor, "N V"], k: int, chunk: int = 128) -> tuple[Tensor, Tensor]:
    """`x.topk(k)` for small k and large V: the k largest lie in the k chunks of largest maximum.

    One pass over x (fused with the others by the compiler) and two sorts of a few hundred numbers,
    where torch.topk makes several passes.
    """
    N, V = x.shape
    chunks = -(-V // chunk)
    if chunks <= 2 * k:
        return x.topk(k)
    x = F.pad(x, (0, chunks * chunk - V), value=-math.inf).reshape(N, chunks, chunk)
    best = x.amax(-1).topk(k).indices
    inside = x.gather(1, best[..., None].expand(N, k, chunk)).reshape(N, k * chunk)
    values, at = inside.topk(k)
    index = best.gather(1, at // chunk) * chunk + at % chunk
    return values, index.clamp(max=V - 1)  # -inf ties with the padding when few are finite


def _validate(batch: int, max_length: int) -> None:
    for name, value in (("batch", batch), ("max_length", max_length)):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
