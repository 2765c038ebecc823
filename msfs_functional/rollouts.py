"""Rollouts: prompts in, completions with their log-probabilities out, as one pytree of tensors.

    roll = Roller(model, state.params, Settings(32, samples=8, stop_tokens=(EOS,)))
    rollout = roll(prompts, key)              # rows: prompt 0's samples, prompt 1's, ...

Generation runs on the training parameters themselves: a step that writes in place (as `make_step`
does) is seen by the next rollout. Where the computation has another dtype than the parameters, one
set of cast parameters is kept and written over before each rollout, as every mixed-precision step
casts them.

Widths are rounded up, so that few shapes occur:

    tokens   p p p p c c c e 0 0          p prompt, c completion, e its end token
    mask     0 0 0 0 1 1 1 1 0 0

Dimension key: B prompts, N = B * samples rows, T tokens.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from msfs_functional.generation import Generator, Settings
from msfs_functional.models.decoder_generation import language_model
from msfs_functional.params import Functional, Params


class Rollout(NamedTuple):
    """What a policy answered, and what it thought of its own answers."""

    tokens: Int64[Tensor, "N T"]  # prompt, completion with its end token, padding
    mask: Bool[Tensor, "N T"]  # True on tokens of the completion
    logps: Float[Tensor, "N T"]  # of each token under the sampler, nats; zeros where masked
    ended: Bool[Tensor, "N"]  # by an end token, not by the limit

    def completions(self) -> list[list[int]]:
        """Ids of each completion, the end token included."""
        rows = zip(self.tokens.tolist(), self.mask.tolist(), strict=True)
        return [[t for t, kept in zip(*row, strict=True) if kept] for row in rows]


def width_of(longest: int, settings: Settings, multiple: int = 16) -> int:
    """Tokens of a rollout's rows whose longest prompt has so many."""
    return -(-longest // multiple) * multiple + settings.max_new_tokens


class Roller:
    """roll(prompts, key) -> Rollout, compiled where that works.

    Args:
        model: a decoder.
        params: those that training writes into.
        settings: how far to go, how to draw, where to stop.
        dtype: of the computation; None: that of the parameters.
        multiple: widths of prompts are rounded up to it [tokens].
        compile: as `Generator`.
        longest: tokens of the longest prompt there is: all rollouts then have one `width`.
        shared: generate from memory of its own, so that a call may bring other parameters.

    Raises:
        ValueError: settings without a stop token, unless `endless`: completions would never end.
    """

    def __init__(
        self,
        model: Functional,
        params: Params,
        settings: Settings,
        *,
        dtype: torch.dtype | None = None,
        multiple: int = 16,
        compile: bool | None = None,
        implementation: str = "flash",
        endless: bool = False,
        longest: int | None = None,
        shared: bool = False,
    ):
        if not settings.stop_tokens and not endless:
            raise ValueError(
                "stop_tokens () holds no end token, so no completion would end: give the "
                "tokenizer's, or endless=True for completions of one length"
            )
        self.params, self.settings, self.multiple = dict(params), settings, multiple
        self.dtype = dtype or next(iter(params.values())).dtype
        with torch.no_grad():
            # what generation reads: the parameters themselves, or one cast set that is kept
            self.read = {
                name: value.to(self.dtype, copy=shared) if value.is_floating_point() else value
                for name, value in params.items()
            }
        self.width = None if longest is None else width_of(longest, settings, multiple)
        self.generate = Generator(
            language_model(model, self.read, implementation=implementation),  # pyright: ignore
            compile=compile,
        )

    def __call__(
        self,
        prompts: Sequence[Sequence[int]] | Int64[Tensor, "B T"],
        key: Int64[Tensor, "*B 2"],
        params: Params | None = None,
    ) -> Rollout:
        """Completions of the prompts.

        Args:
            prompts: ids, of any lengths.
            key: for all, or one for each prompt.
            params: in place of those given at first.

        Raises:
            ValueError: an empty prompt, one beyond the context, other parameters where generation
                reads the first ones themselves.
        """
        if isinstance(prompts, Tensor):
            prompts = prompts.tolist()
        self._refresh(params or self.params)
        with torch.no_grad():
            made = self.generate(prompts, self.settings, key=key)
        samples, new = self.settings.samples, self.settings.max_new_tokens
        width = self.width or width_of(max(map(len, prompts)), self.settings, self.multiple)
        tokens = torch.full((len(prompts) * samples, width), self.settings.pad)
        for i, prompt in enumerate(prompts):
            tokens[i * samples : (i + 1) * samples, : len(prompt)] = torch.tensor(prompt)
        device = made.tokens.device
        lengths = torch.tensor([len(p) for p in prompts], device=device).repeat_interleave(samples)
        tokens = tokens.to(device)
        slots = torch.arange(new, device=device)
        inside, places = slots < made.lengths[:, None], lengths[:, None] + slots
        old = tokens.gather(1, places)
        tokens = tokens.scatter(1, places, torch.where(inside, made.tokens, old))
        mask = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, places, inside)
        logps = torch.zeros(tokens.shape, device=device)
        logps = logps.scatter(1, places, torch.where(inside, made.logps, 0.0))
        return Rollout(tokens, mask, logps, made.ended)

    def _refresh(self, params: Params) -> None:
        for name, own in self.read.items():
            given = params[name]
            if own is given:
                continue
            if not self.generate.compile and given.dtype == self.dtype:
                self.read[name] = given
            elif own is self.params[name]:
                raise ValueError(
                    f"generation reads {name!r} where training writes it, and a call brings another"
                    " tensor: make the Roller with shared=True"
                )
            else:
                own.copy_(given)


class SampleTable:
    """Rows of a JSON lines file, each with the iteration it is of; later ones, which a run that was
    killed may have left, are dropped when it goes on.

    Args:
        path: of the file.
        iteration: the last one that is kept.
        every: iterations from one entry to the next.
    """

    def __init__(self, path: Path, iteration: int = 0, every: int = 5):
        self.path, self.every = path, every
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["iteration"] <= iteration]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def add(self, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if iteration % self.every == 1 or self.every == 1:
            with self.path.open("a", encoding="utf-8") as file:
                for row in rows:
                    line = json.dumps({"iteration": iteration, **row}, ensure_ascii=False)
                    file.write(f"{line}\n")
