"""Beam search against transformers: MarianMTModel.generate and ours, same weights, same settings.

What it shows: sentences per second of both in one run, for each implementation of our attention,
after checking in float32 that both return the same hypotheses. Random weights: the work is the
same as with trained ones, and every sentence takes all of its tokens.

    python recipes/bench_decode.py                            # one GPU, Transformer base, bf16
    python recipes/bench_decode.py --device cpu --dtype float32 --small
    python recipes/bench_decode.py --profile                  # where our time goes
"""

import functools
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from measuring import kernels
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from msfs_functional import decoding
from msfs_functional.attention import Implementation
from msfs_functional.models import transformer as tf
from msfs_functional.models.marian import from_marian
from msfs_functional.params import Params, cast

EOS = 2


@dataclass(frozen=True)
class Config:
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the timed runs
    batch: int = 64  # sentences
    beams: int = 5
    source_tokens: int = 16
    new_tokens: int = 24  # tokens made for each sentence
    implementations: tuple[Literal["flash", "sdpa", "reference"], ...] = (
        "flash",
        "sdpa",
        "reference",
    )  # of our attention while decoding
    check_every: int = 8  # tokens between two looks at whether all sentences have ended
    repeats: int = 10  # timed runs; the median counts
    seed: int = 0
    small: bool = False  # a tiny model and batch: only to see that everything runs
    profile: bool = False  # print the kernels of our first implementation
    out: Path | None = None  # also write the figures here, as JSON


def build_marian(config: Config) -> Any:
    """Transformer base in Marian's layout, with weights large enough for varied hypotheses."""
    width, layers, hidden, heads, vocab = 512, 6, 2048, 8, 32000
    if config.small:
        width, layers, hidden, heads, vocab = 32, 2, 64, 4, 300
    torch.manual_seed(config.seed)
    model: Any = transformers.MarianMTModel(
        transformers.MarianConfig(
            vocab_size=vocab,
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_ffn_dim=hidden,
            decoder_ffn_dim=hidden,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            max_position_embeddings=256,
            activation_function="relu",
            scale_embedding=True,
            pad_token_id=0,
            eos_token_id=EOS,
            forced_eos_token_id=EOS,
            decoder_start_token_id=0,
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and "positions" not in name and parameter.ndim == 2:
            nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    model.generation_config.bad_words_ids = [[0]]
    return model.to(config.device)


def build_ours(
    marian: Any,
    config: Config,
    implementation: Implementation,
    dtype: torch.dtype,
) -> Callable[[Tensor, Tensor], decoding.Hypotheses]:
    """(source, lengths) -> hypotheses: encoder, caches and search, all compiled."""
    shape, params = from_marian(marian.config.to_dict(), marian.state_dict())
    model, params = tf.transformer(shape), cast(params, dtype)

    def start(params: Params, source: Tensor, lengths: Tensor) -> tf.Cache:
        arguments = (source, lengths, config.new_tokens, config.beams)
        return model.apply(params, *arguments, method="start", implementation=implementation)

    start = torch.compile(start, fullgraph=True, dynamic=False)
    step_fn = functools.partial(tf.decode_step(model, implementation=implementation), params)
    runner = decoding.Compiled(check_every=config.check_every)

    def search(source: Tensor, lengths: Tensor) -> decoding.Hypotheses:
        with torch.no_grad():
            cache = start(params, source, lengths)
        return decoding.beam_search(
            step_fn,
            cache,
            batch=config.batch,
            beams=config.beams,
            max_length=config.new_tokens,
            bos=0,
            eos=EOS,
            force_eos=True,
            banned=(0,),
            reorder_fn=tf.reorder_cache,
            runner=runner,
        )

    return search


def build_theirs(marian: Any, config: Config) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def generate(source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        out = marian.generate(
            source,
            attention_mask=(
                torch.arange(source.shape[1], device=source.device) < lengths[:, None]
            ).long(),
            num_beams=config.beams,
            max_new_tokens=config.new_tokens,
            return_dict_in_generate=True,
            output_scores=True,
        )
        return out.sequences[:, 1:], out.sequences_scores

    return generate


def compare(ours: decoding.Hypotheses, theirs: tuple[Tensor, Tensor]) -> tuple[int, float]:
    """(sentences with the same hypothesis, largest difference of scores in nats)."""
    tokens, scores = theirs
    length = min(tokens.shape[1], ours.tokens.shape[-1])
    inside = torch.arange(length, device=tokens.device) < ours.lengths
    same = (tokens[:, :length] == ours.tokens[:, 0, :length]) | ~inside
    return int(same.all(1).sum()), float((scores - ours.scores[:, 0]).abs().max())


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


def main(config: Config) -> dict:
    console = Console(width=120)
    torch._dynamo.config.recompile_limit = 64  # each implementation and dtype is one
    if config.small:
        config = Config(**{**asdict(config), "batch": 4, "new_tokens": 8, "repeats": 2})
    device = torch.device(config.device)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    console.print(
        f"{chip or 'CPU'}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {config}"
    )
    marian = build_marian(config)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch, config.source_tokens)
    source = torch.randint(3, marian.config.vocab_size, shape, generator=generator).to(device)
    lengths = torch.randint(
        config.source_tokens // 2, config.source_tokens + 1, shape[:1], generator=generator
    ).to(device)
    lengths[0] = config.source_tokens

    result: dict = {
        "chip": chip,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "config": json.loads(json.dumps(asdict(config), default=str)),
    }
    expected = build_theirs(marian, config)(source, lengths)
    table = Table(
        "beam search", "sentences/s", "ms a batch", "x", "same in float32", "first call s"
    )
    equal = {}
    for implementation in config.implementations:
        search = build_ours(marian, config, implementation, torch.float32)
        same, apart = compare(search(source, lengths), expected)
        equal[implementation] = f"{same} of {config.batch}, scores within {apart:.0e}"
        console.print(f"float32, {implementation}: {equal[implementation]}")

    dtype = getattr(torch, config.dtype)
    searches = {}
    for implementation in config.implementations:
        start = time.perf_counter()
        searches[implementation] = build_ours(marian, config, implementation, dtype)
        searches[implementation](source, lengths).tokens.cpu()
        result[implementation] = {"first_call_s": time.perf_counter() - start}
    generate = build_theirs(marian.to(dtype), config)
    theirs = seconds(lambda: generate(source, lengths), config.repeats, device.type)
    result["transformers"] = {"sentences_per_s": config.batch / theirs}
    table.add_row(
        "transformers generate",
        f"{config.batch / theirs:.0f}",
        f"{1e3 * theirs:.1f}",
        "1.0",
        "",
        "",
    )
    for implementation, search in searches.items():
        took = seconds(lambda: search(source, lengths), config.repeats, device.type)  # noqa: B023
        row = result[implementation]
        row |= {"sentences_per_s": config.batch / took, "same_in_float32": equal[implementation]}
        table.add_row(
            f"ours, {implementation}",
            f"{config.batch / took:.0f}",
            f"{1e3 * took:.1f}",
            f"{theirs / took:.1f}",
            equal[implementation],
            f"{row['first_call_s']:.1f}",
        )
    console.print(table)
    if config.profile:
        search = next(iter(searches.values()))
        print(kernels(lambda: search(source, lengths), steps=2))
    if config.out is not None:
        config.out.write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
