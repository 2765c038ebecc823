"""Generation: prompts of different lengths go in, sampled tokens and their log-probabilities out.

A model takes part through the three pure functions of a `LanguageModel`, and nothing else is known
of it. Prompts are prefilled in one call, then every token is one step of a state of fixed shapes:

    begin    prompts -> caches, first tokens          advance    state -> state with one more token

Both write into a state that the `Generator` keeps, so on a GPU each is one CUDA graph: one launch a
token, or for several tokens where nobody looks in between. Row r of a batch gives the tokens that
it gives alone, with the same key.

Dimension key: B prompts, N = B * samples rows, T prompt tokens, M new tokens at most, V vocabulary.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import optree
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64, Shaped
from torch import Tensor

from msfs_functional import random
from msfs_functional.compiling import (
    can_compile,
    compile_per_shape,
    fresh,
    graphed,
    why_not_compile,
)
from msfs_functional.decoding import keep_min_p, keep_top_k, keep_top_p
from msfs_functional.regions import Regions, region

Prompts = Sequence[Sequence[int]] | Int64[Tensor, "B T"]
TextFn = Callable[[list[int]], str]  # ids -> text, a tokenizer's decode
STRIDE = 8  # tokens of one launch on a GPU, where nobody looks in between
PART = 256  # logits that are looked through at once
BUCKET = 64  # compiled prompts, outputs and caches have lengths that are multiples of it


class LanguageModel(NamedTuple):
    """A model as generation sees it. Caches are pytrees of tensors with their rows in dim 0; a
    longer cache begins with the entries of a shorter one. A cache that goes in is spent: functions
    may write into its memory."""

    init_cache: Callable[[int, int], Any]  # (rows, tokens at most) -> cache
    prefill: Callable[..., tuple[Tensor, Any]]
    # (tokens (B, T) padded on the right, lengths (B,), cache, **inputs) -> (logits (B, V), cache)
    step: Callable[[Tensor, Any, Tensor], tuple[Tensor, Any]]
    # (tokens (N,), cache, positions (N,)) -> (logits (N, V), cache)
    max_length: int  # tokens
    device: torch.device | str


@dataclass(frozen=True)
class Sampling:
    """Tokens drawn from softmax(logits / temperature), cut by top-k, then top-p, then min-p."""

    temperature: float = 1.0  # 0 takes the most probable token
    top_k: int | None = None  # candidates to keep
    top_p: float | None = None  # probability in (0, 1] that the kept candidates hold
    min_p: float | None = None  # in (0, 1]; least probability kept, as a share of the largest

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must not be negative; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k ({self.top_k}) must be at least 1; None keeps all")
        for name in ("top_p", "min_p"):
            p = getattr(self, name)
            if p is not None and not 0 < p <= 1:
                raise ValueError(f"{name} ({p}) must be in (0, 1]; None keeps all")

    def cut(self, logits: Float[Tensor, "... V"]) -> Float[Tensor, "... V"]:
        """Logits at this temperature, -inf where a token is never drawn."""
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        return logits if self.min_p is None else keep_min_p(logits, self.min_p)

    def draw(
        self, keys: Int64[Tensor, "N 2"], count: Int64[Tensor, ""], logits: Float[Tensor, "N V"]
    ) -> Int64[Tensor, "N"]:
        """Token number `count` of each row, from the row's own key."""
        if self.temperature == 0:
            return first_largest(logits)

        def one(key: Tensor, logits: Tensor) -> Tensor:
            return random.categorical(random.fold_in(key, count), logits)

        return torch.vmap(one)(keys, self.cut(logits))


GREEDY = Sampling(temperature=0.0)


def first_largest(x: Float[Tensor, "... V"]) -> Int64[Tensor, "..."]:
    """x.argmax(-1), the first of equal ones, of which a GPU does parts side by side.

    A compiled argmax is one program for each row: of 50,000 numbers it takes 14 microseconds.
    """
    if x.shape[-1] <= 4 * PART:
        return x.argmax(-1)
    parts = F.pad(x, (0, -x.shape[-1] % PART), value=-math.inf).unflatten(-1, (-1, PART))
    part = parts.amax(-1).argmax(-1, keepdim=True)
    inner = parts.take_along_dim(part[..., None], -2)[..., 0, :].argmax(-1)
    return part[..., 0] * PART + inner


@dataclass(frozen=True)
class Settings:
    """How far to go, how to draw and where to stop."""

    max_new_tokens: int  # for each row
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1  # rows for each prompt
    stop_tokens: tuple[int, ...] = ()  # ids that end a row
    stop_strings: tuple[str, ...] = ()  # texts that end a row
    growing: bool = False  # a short cache that doubles as needed, instead of one that fits all
    pad: int = 0  # id that fills up ended rows

    def __post_init__(self):
        for name in ("max_new_tokens", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if "" in self.stop_strings:
            raise ValueError(f"stop_strings {self.stop_strings} must not hold an empty text")


class State(NamedTuple):
    """What one more token needs; rows of a batch end at different times."""

    cache: Any
    last: Int64[Tensor, "N"]  # token that enters next
    positions: Int64[Tensor, "N"]  # of `last`
    keys: Int64[Tensor, "N 2"]
    count: Int64[Tensor, ""]  # tokens made so far
    tokens: Int64[Tensor, "N M"]
    logps: Float[Tensor, "N M"]
    lengths: Int64[Tensor, "N"]
    ended: Bool[Tensor, "N"]


class Generated(NamedTuple):
    """Rows of prompt b are b * samples ... (b + 1) * samples - 1."""

    tokens: Int64[Tensor, "N M"]  # the stop token included, then padding
    lengths: Int64[Tensor, "N"]
    logps: Float[Tensor, "N M"]  # nats, under the model itself: temperature 1, nothing cut
    ended: Bool[Tensor, "N"]  # by a stop token or string, not by the limit
    texts: list[str] | None  # without what stopped them; None without a text_fn


class Piece(NamedTuple):
    """What a row has gained since the last piece."""

    row: int
    tokens: list[int]
    text: str
    ended: bool


@dataclass(frozen=True)
class Advance:
    """One more token for every row that has not ended."""

    model: LanguageModel
    settings: Settings

    def __call__(self, s: State) -> State:
        logits, cache = self.model.step(s.last, s.cache, s.positions)
        return self.append(s._replace(cache=cache, positions=s.positions + ~s.ended), logits)

    def append(self, s: State, logits: Float[Tensor, "N V"]) -> State:
        rows = s.keys, s.count, s.tokens, s.logps, s.lengths, s.ended
        token, count, tokens, logps, lengths, ended = with_token(logits, *rows, self.settings)
        changed = {"tokens": tokens, "logps": logps, "lengths": lengths, "ended": ended}
        return s._replace(last=token, count=count, **changed)


@region
def with_token(
    logits: Float[Tensor, "N V"],
    keys: Int64[Tensor, "N 2"],
    count: Int64[Tensor, ""],
    tokens: Int64[Tensor, "N M"],
    logps: Float[Tensor, "N M"],
    lengths: Int64[Tensor, "N"],
    ended: Bool[Tensor, "N"],
    settings: Settings,
) -> tuple[Tensor, ...]:
    """(tokens drawn from the logits, count, tokens, logps, lengths, ended), as in `State`."""
    logits = logits.float()
    token = settings.sampling.draw(keys, count, logits)
    logp = logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)
    token = torch.where(ended, settings.pad, token)
    over = ended
    for stop in settings.stop_tokens:
        over = over | (token == stop)
    logp = torch.where(ended, 0.0, logp)
    tokens = tokens.index_copy(1, count[None], token[:, None])
    logps = logps.index_copy(1, count[None], logp[:, None])
    return token, count + 1, tokens, logps, lengths + ~ended, over


def begin(advance: Advance, state: State, batch: Mapping[str, Any]) -> State:
    """Writes prefilled caches into `state`'s and returns the state after the first token."""
    lengths, N = batch["lengths"], state.last.shape[0]
    B, T = batch["tokens"].shape
    samples = N // B
    model, cache = advance.model, advance.model.init_cache(B, T)
    logits, cache = model.prefill(batch["tokens"], lengths, cache, **batch["inputs"])
    copy_corners(state.cache, optree.tree_map(lambda x: x.repeat_interleave(samples, 0), cache))
    lengths = lengths.repeat_interleave(samples)
    empty = state._replace(
        positions=lengths,
        keys=batch["keys"],
        count=torch.zeros_like(state.count),
        tokens=torch.full_like(state.tokens, advance.settings.pad),
        logps=torch.zeros_like(state.logps),
        lengths=torch.zeros_like(state.lengths),
        ended=torch.zeros_like(state.ended),
    )
    return advance.append(empty, logits.repeat_interleave(samples, 0))


def right_padded(
    tokens: Int[Tensor, "B T"], mask: Shaped[Tensor, "B T"]
) -> tuple[Int[Tensor, "B T"], Int64[Tensor, "B"]]:
    """Prompts padded on either side, as (padded on the right, lengths); mask is 0 on padding."""
    order = torch.argsort((mask == 0).long(), dim=1, stable=True)
    return tokens.take_along_dim(order, 1), (mask != 0).sum(1)


def padded(rows: Sequence[Sequence[int]], pad: int) -> Int64[Tensor, "B T"]:
    """Rows of ids, padded on the right; seven times faster than torch.tensor of nested lists."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ids = np.full((len(rows), lengths.max(initial=0)), pad, dtype=np.int64)
    inside = np.arange(ids.shape[1]) < lengths[:, None]
    ids[inside] = np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(lengths.sum()))
    return torch.from_numpy(ids)


def row_keys(key: Int64[Tensor, "*B 2"], prompts: int, samples: int) -> Int64[Tensor, "N 2"]:
    """A key for every row: fold_in(prompt's key, sample); fold_in(key, prompt) from one for all."""
    if key.shape == (2,):
        key = random.fold_in(key, torch.arange(prompts, device=key.device))
    if key.shape != (prompts, 2):
        raise ValueError(
            f"key {tuple(key.shape)} must be (2,) or one for each prompt ({prompts}, 2)"
        )
    numbers = torch.arange(samples, device=key.device)
    return torch.vmap(lambda one: random.fold_in(one, numbers))(key).reshape(-1, 2)


def copy_corners(state: Any, shorter: Any) -> None:
    """Writes every tensor of `shorter` into the beginning of its counterpart, in all dims."""
    trees: tuple[Any, ...] = (state, shorter)
    leaves = [optree.tree_leaves(tree) for tree in trees]
    for own, new in zip(*leaves, strict=True):
        own[tuple(slice(n) for n in new.shape)].copy_(new)


def writing(update: Callable[[Any, Any], Any]) -> Callable[[State, Any], Any]:
    """`state[...] = update(state, batch)`; returns (state, {})."""

    def write(state: Any, batch: Any) -> tuple[Any, dict]:
        new = update(state, batch)
        for old, value in zip(optree.tree_leaves(state), optree.tree_leaves(new), strict=True):
            if old is not value:
                old.copy_(value)
        return state, {}

    return write


def in_regions(fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """fn, whose regions are compiled."""
    regions = Regions(dynamic=False)

    def run(state: Any, batch: Any) -> Any:
        with regions.compiled():
            return fn(state, batch)

    return run


def times(fn: Callable[[Any, Any], Any], count: int) -> Callable[[Any, Any], Any]:
    """fn so many times on one state."""

    def run(state: Any, batch: Any) -> Any:
        for _ in range(count):
            out = fn(state, batch)
        return out

    return run


class Text:
    """A row's text, token by token, up to the first stop string."""

    def __init__(self, text_fn: TextFn, stops: Sequence[str] = ()):
        self.text_fn, self.stops = text_fn, stops
        self.ids: list[int] = []
        self.start, self.read = 0, 0  # ids from `start` are decoded again; those to `read` are text
        self.text, self.given, self.stopped = "", 0, False

    def add(self, token: int) -> bool:
        """Whether the text now holds a stop string, from which on it is cut off."""
        self.ids.append(token)
        self._decode()
        found = [at for at in map(self.text.find, self.stops) if at >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return self.stopped

    def take(self, final: bool) -> str:
        """Text not taken before. Until the end, what may still change stays back: the bytes of an
        unfinished character, and text that a stop string may begin with."""
        if final and not self.stopped:
            self._decode(final=True)
        doubtful = 0
        if not final:
            ends = (self.text[-n:] for n in range(max(map(len, self.stops), default=1) - 1, 0, -1))
            starts = (end for end in ends if any(stop.startswith(end) for stop in self.stops))
            doubtful = len(next(starts, ""))
        sure = max(len(self.text) - doubtful, self.given)
        piece, self.given = self.text[self.given : sure], sure
        return piece

    def _decode(self, final: bool = False) -> None:
        before = self.text_fn(self.ids[self.start : self.read])
        after = self.text_fn(self.ids[self.start :])
        if len(after) > len(before) and (final or not after.endswith("\ufffd")):
            self.text += after[len(before) :]
            self.start, self.read = self.read, len(self.ids)


@dataclass
class Row:
    """What the host knows of a row."""

    text: Text | None
    count: int = 0  # tokens
    ended: bool = False

    def add(self, tokens: list[int], stop_tokens: Sequence[int]) -> list[int]:
        """Takes tokens until one ends the row; returns those it took."""
        for i, token in enumerate(tokens):
            self.count += 1
            self.ended = token in stop_tokens
            if not self.ended and self.text is not None:
                self.ended = self.text.add(token)
            if self.ended:
                return tokens[: i + 1]
        return tokens


class Kept(NamedTuple):
    """A state in memory of its own and the functions that write into it."""

    state: State
    begin: Callable[[State, Any], Any]
    advance: Callable[[State, Any], Any]
    stride: Callable[[State, Any], Any]  # STRIDE times `advance`


class Generator:
    """generate = Generator(model); generate(prompts, Settings(100), key=key) -> Generated

    Compiled, it keeps a few states with their functions, one for each number of rows, capacity and
    settings. On a GPU prefill and step are then a CUDA graph each, which reads the parameters that
    `model` closes over: those updated in place are seen, replaced ones are not.

    Args:
        model: see `LanguageModel`.
        text_fn: ids -> text, a tokenizer's decode: for texts and stop strings.
        compile: default: on a GPU where that works. True: prefill and step are one graph each.
            "regions": a model's block is compiled once for all (`regions`), which starts many times
            sooner.
        options: of torch.compile for the step, say {"coordinate_descent_tuning": True}, which
            makes the products of a single row faster.
        every: tokens between two looks at whether all rows have ended (a look makes the CPU wait).
        keep: states that are kept; the oldest go first.

    Raises:
        ValueError: compile=True where it cannot be.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        text_fn: TextFn | None = None,
        compile: bool | Literal["regions"] | None = None,
        options: dict[str, Any] | None = None,
        every: int = 16,
        keep: int = 8,
    ):
        device = torch.device(model.device)
        if min(every, keep) < 1:
            raise ValueError(f"every ({every}) and keep ({keep}) must be at least 1")
        if compile is None:
            compile = device.type == "cuda" and can_compile(device)
        elif compile and (reason := why_not_compile(device)):
            raise ValueError(f"compile=True is not possible: {reason}; or pass compile=False")
        self.model, self.text_fn, self.device = model, text_fn, device
        self.compile, self.options, self.every, self.keep = compile, options, every, keep
        self._kept: dict[Any, Kept] = {}

    def __call__(
        self,
        prompts: Prompts,
        settings: Settings,
        *,
        key: Tensor | None = None,
        mask: Shaped[Tensor, "B T"] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Generated:
        """Generates to the end.

        Args:
            prompts: lists of ids, or a tensor (B, T) with `mask`.
            key: from which every row gets its own, or one key for each prompt (B, 2); only greedy
                goes without.
            mask: 0 on padding, on the left or right of the prompts of a tensor.
            inputs: more arguments of the model's prefill, tensors by name (embeddings with images
                in them); padded on the right, as `right_padded` leaves the tokens.

        Raises:
            ValueError: an empty prompt, more tokens than the model takes, options that do not fit.
        """
        stops = settings.stop_tokens or settings.stop_strings
        every = self.every if stops else settings.max_new_tokens
        run = self._run(prompts, settings, key, mask, inputs, every)
        while True:
            try:
                next(run)
            except StopIteration as end:
                return end.value

    def room(self, prompts: Sequence[Sequence[int]]) -> int:
        """New tokens that all of these prompts leave room for.

        Raises:
            ValueError: none.
        """
        longest = max(map(len, prompts))
        if longest >= self.model.max_length:
            raise ValueError(
                f"a prompt of {longest} tokens leaves no room in the model's max_length "
                f"({self.model.max_length}): shorten it"
            )
        return self.model.max_length - longest

    def stream(
        self,
        prompts: Prompts,
        settings: Settings,
        *,
        key: Tensor | None = None,
        mask: Shaped[Tensor, "B T"] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        every: int = 1,
    ) -> Iterator[list[Piece]]:
        """Yields what each row gained, every so many tokens; the same tokens as a call."""
        yield from self._run(prompts, settings, key, mask, inputs, every)

    def _run(
        self,
        prompts: Prompts,
        settings: Settings,
        key: Tensor | None,
        mask: Tensor | None,
        inputs: Mapping[str, Tensor] | None,
        every: int,
    ) -> Iterator[Any]:
        batch, longest = self._batch(prompts, settings, key, mask, inputs)
        (B, T), limit = batch["tokens"].shape, settings.max_new_tokens
        N, most = B * settings.samples, self._round(limit)
        full = min(self._round(max(longest + limit - 1, T)), self.model.max_length)
        capacity = min(self._round(T + BUCKET), full) if settings.growing else full
        text_fn, stops = self.text_fn, settings.stop_strings
        rows = [Row(None if text_fn is None else Text(text_fn, stops)) for _ in range(N)]
        name = (N, capacity, most, settings)
        kept, made, seen = self._take(name), 1, 0
        try:
            self._write(kept.begin, kept.state, batch)
            while True:
                if made % every == 0 or made == limit:
                    yield self._look(kept.state, rows, seen, made, settings)
                    seen = made
                    if made == limit or all(row.ended for row in rows):
                        break
                if longest + made > capacity:
                    capacity = min(2 * capacity, full)
                    longer = (N, capacity, most, settings)
                    state, kept, name = self._give(name, kept), self._take(longer), longer
                    copy_corners(kept.state, state)
                # Up to the next look, or to where the cache must grow.
                room = min(limit, (made // every + 1) * every, capacity - longest + 1) - made
                many = self.compile and room >= STRIDE
                self._write(kept.stride if many else kept.advance, kept.state, ())
                made += STRIDE if many else 1
            return self._result(kept.state, rows, settings)
        finally:
            self._give(name, kept)

    def _batch(
        self,
        prompts: Prompts,
        settings: Settings,
        key: Tensor | None,
        mask: Tensor | None,
        inputs: Mapping[str, Tensor] | None,
    ) -> tuple[dict[str, Any], int]:
        """What `begin` takes, and the tokens of the longest prompt."""
        if isinstance(prompts, Tensor):
            mask = torch.ones_like(prompts) if mask is None else mask
            tokens, lengths = right_padded(prompts, mask)
        else:
            if mask is not None:
                raise ValueError("mask goes with prompts in a tensor; lists have their lengths")
            lengths = torch.tensor([len(prompt) for prompt in prompts])
            tokens = padded(prompts, settings.pad)
        if not len(tokens) or int(lengths.min()) < 1:
            raise ValueError(
                f"{len(tokens)} prompts, each needs at least one token: begin with BOS"
            )
        longest, most = int(lengths.max()), self.model.max_length
        if longest + settings.max_new_tokens > most:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens ({settings.max_new_tokens}) "
                f"exceed the model's max_length ({most}); shorten one of them"
            )
        if settings.stop_strings and self.text_fn is None:
            raise ValueError("stop_strings need the Generator's text_fn, a tokenizer's decode")
        if key is None and settings.sampling.temperature > 0:
            raise ValueError("sampling needs a key of msfs_functional.random; or take GREEDY")
        if key is None:  # nothing is drawn
            keys = torch.zeros(len(tokens) * settings.samples, 2, dtype=torch.int64)
        else:
            keys = row_keys(key.to(self.device), len(tokens), settings.samples)
        wide = max(min(self._round(tokens.shape[1]), most), tokens.shape[1])
        tokens = F.pad(tokens, (0, wide - tokens.shape[1]), value=settings.pad)
        batch = {
            "tokens": tokens.to(self.device),
            "lengths": lengths.to(self.device),
            "keys": keys.to(self.device),
            "inputs": dict(inputs or {}),
        }
        return batch, longest

    def _round(self, n: int) -> int:
        return -(-n // BUCKET) * BUCKET if self.compile else n

    def _take(self, name: Any) -> Kept:
        """The state of that name, which nobody else has until it is given back."""
        if name in self._kept:
            return self._kept.pop(name)
        N, capacity, most, settings = name
        advance = Advance(self.model, settings)
        rows = torch.zeros(N, dtype=torch.int64, device=self.device)
        state = State(
            cache=self.model.init_cache(N, capacity),
            last=rows,
            positions=rows.clone(),
            keys=rows[:, None].repeat(1, 2),
            count=rows.new_zeros(()),
            tokens=rows[:, None].repeat(1, most),
            logps=rows[:, None].repeat(1, most).float(),
            lengths=rows.clone(),
            ended=rows.bool(),
        )
        first, later = writing(functools.partial(begin, advance)), writing(lambda s, _: advance(s))
        if self.compile == "regions":
            first, later = in_regions(first), in_regions(later)
        elif self.compile:
            first = compile_per_shape(first, dynamic=False)
            options = self.options
            later = torch.compile(fresh(later), fullgraph=True, dynamic=False, options=options)
        several = times(later, STRIDE)
        if self.compile and self.device.type == "cuda":
            first, later, several = graphed(first), graphed(later), graphed(several)
        return Kept(state, first, later, several)

    def _give(self, name: Any, kept: Kept) -> State:
        """Puts a state back; another call may take it and write over it."""
        if self.compile:
            self._kept[name] = kept
            while len(self._kept) > self.keep:
                del self._kept[next(iter(self._kept))]
        return kept.state

    def _write(self, fn: Callable[[State, Any], Any], state: State, batch: Any) -> None:
        with torch.no_grad():
            fn(state, batch)

    def _look(
        self, state: State, rows: list[Row], seen: int, made: int, settings: Settings
    ) -> list[Piece]:
        """Brings tokens to the host, finds the rows that end, tells the device of new ones."""
        pieces, tokens = [], state.tokens[:, seen:made].tolist()
        for r, row in enumerate(rows):
            if not row.ended:
                new = row.add(tokens[r], settings.stop_tokens)
                last = row.ended or made == settings.max_new_tokens
                text = row.text.take(last) if row.text is not None else ""
                pieces.append(Piece(r, new, text, row.ended))
        if settings.stop_strings:
            state.ended.copy_(torch.tensor([row.ended for row in rows]))
        return pieces

    def _result(self, state: State, rows: list[Row], settings: Settings) -> Generated:
        lengths = torch.tensor([row.count for row in rows], device=self.device)
        n = settings.max_new_tokens
        inside = torch.arange(n, device=self.device) < lengths[:, None]
        texts = [row.text.text for row in rows if row.text is not None]
        return Generated(
            tokens=torch.where(inside, state.tokens[:, :n], settings.pad),
            lengths=lengths,
            logps=torch.where(inside, state.logps[:, :n], 0.0),
            ended=torch.tensor([row.ended for row in rows], device=self.device),
            texts=texts if self.text_fn is not None else None,
        )
