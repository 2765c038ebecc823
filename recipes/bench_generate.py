"""Generation against transformers: GPT2LMHeadModel.generate and ours, same weights, greedy.

What it shows: new tokens per second of both in one run (prompts of 128 tokens, 128 new ones, GPT-2
124M, bf16), after checking in float32 that both make the same tokens. transformers runs with its
static cache, whose forward it compiles by itself on a GPU. Random weights: the work is the same as
with trained ones.

    python recipes/bench_generate.py                       # one GPU, batch 1 and 64
    python recipes/bench_generate.py --check               # exit code 1 below 6x, 3x, other tokens
    python recipes/bench_generate.py --tiny --device cpu   # seconds: only to see that it runs
    python recipes/bench_generate.py --profile --batches 1 # where our time goes
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from torch import Tensor, nn

from msfs_functional.generation import GREEDY, Generator, Settings
from msfs_functional.models.decoder import decoder, fuse
from msfs_functional.models.decoder_generation import language_model
from msfs_functional.models.pretrained import from_hub
from msfs_functional.params import cast

GOALS = {1: 6.0, 64: 3.0}  # times transformers' tokens/s, by batch


@dataclass(frozen=True)
class Config:
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the timed runs
    batches: tuple[int, ...] = (1, 64)
    prompt: int = 128  # tokens
    new: int = 128  # tokens
    implementation: Literal["flash", "sdpa", "reference"] = "flash"  # of our attention
    # blocks compiled once for all, or each whole step as one graph
    compile: Literal["regions", "whole"] = "regions"
    tune: bool = False  # whole: with Inductor's coordinate descent, which takes minutes
    peer: bool = True  # time transformers too
    same: bool = True  # compare greedy tokens in float32
    repeats: int = 10  # timed runs; the median counts; 0 times nothing
    seed: int = 0
    tiny: bool = False  # a tiny model, nothing compiled: only to see that everything runs
    check: bool = False  # exit code 1 unless the goals are met
    profile: bool = False  # print our kernels
    out: Path | None = None  # also write the figures here, as JSON


def build_theirs(config: Config) -> Any:
    """GPT-2 with weights large enough for varied tokens."""
    sizes: dict[str, Any] = {}
    if config.tiny:
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300}
    torch.manual_seed(config.seed)
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.1 if "w" in name.split(".")[1] else 0.05)
    return model.to(config.device)


def their_generate(model: Any, config: Config) -> Callable[[Tensor], Tensor]:
    def generate(tokens: Tensor) -> Tensor:
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=config.new,
            min_new_tokens=config.new,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
            disable_compile=config.device == "cpu",
        )
        return out[:, tokens.shape[1] :]

    return generate


def our_generate(theirs: Any, config: Config, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    shape, params = from_hub(theirs.config.to_dict(), theirs.state_dict())
    model, params = decoder(replace(shape, fused=True)), cast(fuse(params), dtype)
    generate = Generator(
        language_model(model, params, implementation=config.implementation),
        compile=False if config.tiny else "regions" if config.compile == "regions" else True,
        options={"coordinate_descent_tuning": True} if config.tune else None,
    )
    return lambda tokens: generate(tokens, Settings(config.new, GREEDY)).tokens


def seconds(run: Callable[[], object], repeats: int, device: str) -> float:
    """Median time of a run after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


def compare_speed(
    config: Config, theirs: Any, prompts: dict[int, Tensor], result: dict[str, Any]
) -> None:
    """Prints tokens/s of both; profiles ours."""
    dtype = getattr(torch, config.dtype)
    theirs = theirs.to(dtype)
    runs = {"ours": our_generate(theirs, config, dtype)}
    if config.peer:
        runs["transformers"] = their_generate(theirs, config)
    for batch, tokens in prompts.items():
        rates = {}
        for name, run in runs.items():
            start = time.perf_counter()
            run(tokens).cpu()
            first = time.perf_counter() - start
            took = seconds(lambda: run(tokens), config.repeats, config.device)  # noqa: B023
            rates[name] = batch * config.new / took
            result[f"{name}, batch {batch}"] = {"tokens_per_s": rates[name], "first_call_s": first}
            times = f"ours {rates['ours'] / rates[name]:5.2f}x" if name != "ours" else ""
            print(
                f"{name:12}  batch {batch:3}  {rates[name]:10,.0f} tokens/s  "
                f"{1e3 * took / config.new:7.3f} ms a token  first call {first:5.1f} s  {times}",
                flush=True,
            )
        if config.peer and batch in GOALS and not config.tiny:
            result["met"] &= rates["ours"] >= GOALS[batch] * rates["transformers"]
        if config.profile:
            profile(lambda: runs["ours"](tokens), config.device)  # noqa: B023


def compare_tokens(
    config: Config, theirs: Any, prompts: dict[int, Tensor], result: dict[str, Any]
) -> None:
    """Prints how many rows are equal in float32, and how near the choice was where others part."""
    torch.compiler.reset()
    ours, peer = our_generate(theirs, config, torch.float32), their_generate(theirs, config)
    for batch, tokens in prompts.items():
        mine, its = ours(tokens), peer(tokens)
        equal = mine == its
        result["met"] &= bool(equal.all())
        print(
            f"float32, batch {batch}: {int(equal.all(1).sum())} of {batch} rows have equal tokens, "
            f"{equal.float().mean():.2%} of all tokens",
            flush=True,
        )
        for row in (~equal.all(1)).nonzero()[:, 0].tolist():
            at = int((~equal[row]).nonzero()[0, 0])
            before = torch.cat([tokens[row], its[row, :at]])
            print(f"  row {row} parts at token {at}: {nearness(theirs, before)}", flush=True)


@torch.no_grad()
def nearness(theirs: Any, tokens: Tensor) -> str:
    """How far apart the two largest logits after these tokens are, in units of float32."""
    first, second = theirs(tokens[None]).logits[0, -1].topk(2).values.tolist()
    apart = (first - second) / (torch.finfo(torch.float32).eps * abs(first))
    return (
        f"transformers' two largest logits are {first:.6f} and {second:.6f}, {apart:.1f} eps apart"
    )


def profile(run: Callable[[], object], device: str) -> None:
    """Prints the kernels of a run."""
    with torch.profiler.profile() as found:
        run()
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=90)
    print(table, flush=True)


def main(config: Config) -> dict:
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.config.recompile_limit = 64
    if config.tiny:
        smaller: dict[str, Any] = {
            "batches": (1, 3),
            "prompt": 12,
            "new": 9,
            "repeats": 3,
            "dtype": "float32",
        }
        config = replace(config, **smaller)
    device = torch.device(config.device)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    print(
        f"{chip or 'CPU'}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{config}"
    )
    theirs = build_theirs(config)
    generator = torch.Generator().manual_seed(config.seed)
    vocab = theirs.config.vocab_size
    prompts = {
        batch: torch.randint(1, vocab - 1, (batch, config.prompt), generator=generator).to(device)
        for batch in config.batches
    }
    result: dict = {"chip": chip, "torch": torch.__version__, "met": True}
    if config.repeats:
        compare_speed(config, theirs, prompts, result)
    if config.same:
        compare_tokens(config, theirs.float(), prompts, result)
    if config.out is not None:
        config.out.write_text(json.dumps(result, indent=1))
    if config.check and not result["met"]:
        print(f"goals not met: same tokens in float32, and {GOALS}")
        sys.exit(1)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
