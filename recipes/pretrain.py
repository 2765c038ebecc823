r"""Pretrain a decoder-only Transformer to predict the next token, on a laptop or on many nodes.

    python recipes/pretrain.py                                  # train, validate, sample, draw

    python recipes/pretrain.py sample --sample.prompt "One cold day, Mia and Tom were on the farm."

    python recipes/pretrain.py export --name big                # a folder that transformers loads

    python recipes/pretrain.py --data.files a.txt b.jsonl       # documents of your own, in memory

    python recipes/pretrain.py --data.stream "corpus/*.parquet"           # read as they are needed
    python recipes/pretrain.py --data.stream roneneldan/TinyStories --model.size small \
        --data.length 512 --data.batch 32
    python recipes/pretrain.py --data.stream HuggingFaceFW/fineweb-edu --data.config sample-10BT \
        --model.size gpt2 --data.length 1024 --data.batch 32 --data.lanes 8

Several processes: the same step, its parameters in shards over a mesh of these degrees.

    torchrun --nproc-per-node 4 recipes/pretrain.py --mesh.dp-shard 4             # one node
    torchrun --nproc-per-node 4 recipes/pretrain.py --mesh.dp-shard 2 --mesh.tp 2
    torchrun --nproc-per-node 4 recipes/pretrain.py --mesh.dp-replicate 2 --mesh.cp 2

    # two nodes, the same command on each (node-a is the first one's address):
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1      # restarts do not find addresses of the dead
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node-a:29500 \
        --rdzv-id 1 --max-restarts 3 recipes/pretrain.py --mesh.dp-replicate 2 --mesh.dp-shard 8 \
        --name big

    # Slurm, two nodes of 8 GPUs and 64 cores:
    sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 --cpus-per-task 64 --wrap '
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        srun --cpus-per-task 64 torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \
            --rdzv-id $SLURM_JOB_ID --rdzv-endpoint \
            $(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1):29500 --max-restarts 3 \
            recipes/pretrain.py --mesh.dp-shard 16 --name big'

Between the GPUs of one host parameters and gradients travel by copies (--mesh.transport). On a
single GPU a step is replayed as one CUDA graph, on several with --train.graph True: it then waits
for no host, which a small model's step, or one on a slow host, mostly does.

Checkpoints hold all that the run is, are written in the background by all processes, and are read
by any number of them in any mesh: --resume --name big goes on, with other degrees if they are
given. The same degrees give the same bits as a run that never stopped, others what another order
of fp32 sums gives. With --max-restarts torchrun starts all processes again when one dies, and they
go on from the last checkpoint. When nothing happens for --mesh.timeout seconds the job ends and
says which process was doing what. SIGTERM, which a preempted job gets, makes a checkpoint after
the step, prints the command to go on with, and exits with 0. (A torchrun that is told itself tells
its processes, gives them 30 seconds, and then ends with 1, whatever they end with.)

Without arguments it learns small stories that the project makes itself, and a judge says how many
of its samples hold together: who gives a thing has it, she is not he, the red ball stays red.
Measured on two cores of a busy Intel Xeon, torch 2.11, seeds 0, 1 and 2 (`--seed 1 --data.seed 1`):
210, 210 and 216 s; 0.348, 0.334 and 0.339 nats a token on validation; of 100 samples the judge
confirms 30, 23 and 30%, of 100 that go on with held-out beginnings, whose pairs of names or of
words no training story has, 37, 39 and 33%, where names drawn at random among those who are there
would give 0.4%. Gates are by ReLU: by swish, Llama's choice, the same steps give less (after 1,300
0.437 nats and 1% of beginnings in place of 0.381 and 15%, seed 0); no gates and LayerNorm give a
little more, but no published layout to export to. One token a word, a small model and Muon came in
together; which of them it takes was not compared on equal terms, and all was chosen on validation
stories of seed 0.

Documents are packed into rows with segment ids, so that attention never crosses them. Validation
loss is in nats a token, ends of documents included; bits per byte divide the same sum by the bytes
of the text. Every evaluation also records tokens/s of one process, the share of time that steps
wait for data, and

    MFU = tokens/s * (6 N + 6 depth heads head_dim length) / peak FLOP/s of all processes

(`msfs_functional.utilisation`). --train.profile 3 leaves a trace of three steps.
"""

import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in translate.py; must stand before torch

import torch
from pretrain_settings import Config, Optimizer, Vocabulary, checked, command_line, degrees

from msfs_functional import (
    agreement,
    checkpoint,
    errors,
    launching,
    meshes,
    optim,
    pictures,
    random,
    schedules,
    sharding,
    tracking,
)
from msfs_functional import config as configs
from msfs_functional import distributed_checkpoint as checkpoints
from msfs_functional.batches import Prefetch
from msfs_functional.compiling import graphed, prepare_compiler
from msfs_functional.documents import Corpus, is_held_out, read_documents, stream_documents
from msfs_functional.gathering import Sharded, sharded
from msfs_functional.generation import Sampling
from msfs_functional.layouts import DECODER, DECODER_BY_TOKENS
from msfs_functional.models import decoder as models
from msfs_functional.models import pretrained
from msfs_functional.next_token import continuations, next_token_loss, validate
from msfs_functional.packing import PackedBatches
from msfs_functional.params import Functional, Params, cast
from msfs_functional.streams import StreamedBatches
from msfs_functional.synthetic.stories import RULES, beginning, shares, stories
from msfs_functional.tokenizer import BOS, EOS, PAD, Tokenizer, train_bpe, train_word_level
from msfs_functional.tracking import Tracker
from msfs_functional.train import init_state, make_step
from msfs_functional.transforms import in_dtype
from msfs_functional.utilisation import Meter, flops_per_token, peak_flops, profiled
from msfs_functional.watchdog import Watchdog

CHECKPOINTS, TOKENIZER = "checkpoints", "tokenizer.json"


def read_data(config: Config) -> Corpus:
    data = config.data
    if data.stream is not None:
        if data.files:
            raise ValueError("--data.stream and --data.files are two sources: give one of them")
        return stream_documents(
            data.stream,
            data.valid,
            config=data.config,
            split=data.split,
            field=data.field,
            valid_share=data.valid_share,
            valid_documents=data.valid_documents,
            first=0 if config.vocabulary.file else config.vocabulary.documents,
        )
    if data.files:
        share = {"valid_share": data.valid_share, "field": data.field, "seed": data.seed}
        return read_documents(data.files, data.valid, **share)
    valid = stories(data.seed, data.valid_documents, split="valid")
    return Corpus(stories(data.seed, data.stories), valid)


def learn_tokenizer(vocabulary: Vocabulary, documents: list[str]) -> Tokenizer:
    if vocabulary.file is not None:
        return Tokenizer.load(vocabulary.file)
    learn = train_word_level if vocabulary.kind == "words" else train_bpe
    return learn(documents, vocabulary.size)


def make_batches(
    config: Config, corpus: Corpus, tokenizer: Tokenizer, share: tuple[int, int]
) -> PackedBatches | StreamedBatches:
    """Packed rows without end; `share` is this process's (number, count)."""
    data = config.data

    def encode(documents: list[str]) -> list[list[int]]:
        return tokenizer.encode(documents, bos=True, eos=True)

    if corpus.stream is None:
        return PackedBatches(encode(corpus.train), data.length, data.batch, data.seed, share)
    aside = 0.0 if data.valid else data.valid_share
    return StreamedBatches(
        corpus.stream,
        encode,
        data.length,
        data.batch,
        data.seed,
        share,
        lanes=data.lanes,
        field=data.field,
        skip_fn=lambda text: is_held_out(text, aside),
    )


def make_model(config: Config, tokenizer: Tokenizer) -> Functional:
    """The decoder on one device.

    Raises:
        ValueError: the tokenizer has more ids than the model has rows.
    """
    own = asdict(config.model)
    size, vocab, _ = own.pop("size"), own.pop("vocab"), own.pop("attention")
    vocab = tokenizer.vocab_size if vocab is None else vocab
    if tokenizer.vocab_size > vocab:
        raise ValueError(
            f"the vocabulary has {tokenizer.vocab_size} ids, more than the model's "
            f"--model.vocab ({vocab}): raise it or lower --vocabulary.size"
        )
    options = {name: value for name, value in own.items() if value is not None}
    return models.decoder(models.PRESETS[size](vocab, max_length=config.data.length, **options))


def make_loss(config: Config, model: Functional, *, dropout: bool = True):
    return next_token_loss(
        model,
        dtype=getattr(torch, str(config.dtype)),
        implementation=config.model.attention or "flash",
        dropout=dropout,
    )


def make_optimizer(config: Optimizer, steps: int) -> optim.Transformation:
    schedule = schedules.cosine(config.learning_rate, steps, warmup=config.warmup)
    decay = config.weight_decay
    adamw = optim.adamw(schedule, config.b1, config.b2, 1e-8, decay, models.DECAY)
    if config.kind == "adamw":
        return adamw
    rate = schedules.cosine(config.muon_rate, steps, warmup=config.warmup)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    muon = optim.muon(rate, weight_decay=decay, matrices=[(r"", True)], dtype=dtype)
    rest = r"norm|bias|embedding|positions|^output"
    return optim.by_group([(rest, adamw), (r"", muon)])


def prepare(config: Config, watchdog: Watchdog) -> tuple[Config, Path, Corpus, Any]:
    """(config, run, corpus, the checkpoint to go on from or None).

    What is wrong with any process is told here, and every process then ends.
    """
    watchdog.at("reading the data")
    with agreement.together():
        config = checked(config)
    config = replace(config, name=agreement.from_all(config.name)[0])
    run = config.out / str(config.name)
    restarts = launching.restarts()
    if config.train.compile:
        prepare_compiler()  # its processes get ready while data is read
    with agreement.together():
        meshes.degrees(agreement.world(), **degrees(config.mesh))
        corpus = read_data(config)
        found = config.resume or (restarts and checkpoint.checkpoints(run / CHECKPOINTS))
        if not found and not restarts and agreement.rank() == 0:
            configs.check_free(run, overwrite=config.overwrite)
    if agreement.world() > 1:
        own = {**asdict(config), "device": torch.device(str(config.device)).type}
        text = "\0".join([*corpus.train, "", *corpus.valid])
        digest = hashlib.sha256(text.encode()).hexdigest()
        agreement.start_alike({"configuration": own, "sha256 of the corpus": digest})
    watchdog.at("looking for a checkpoint")
    resume = agreement.from_all(bool(found))[0]
    place = run / CHECKPOINTS
    if resume and restarts:  # nobody is there to choose: what is damaged is passed over, aloud
        place = checkpoints.last_good(place)
    saved = checkpoints.load(place) if resume and place else None
    return replace(config, overwrite=config.overwrite or restarts > 0), run, corpus, saved


def make_train_step(config: Config, model: Functional, optimizer: optim.Transformation):
    gradient, dtype = None, getattr(torch, str(config.dtype))
    if isinstance(model, Sharded):
        gradient = model.gradient  # gathers and sums beside the computation
    elif dtype != torch.float32:
        gradient = in_dtype(dtype)  # the optimizer reads half the bytes
    step = make_step(
        make_loss(config, model),
        optimizer,
        accumulation=config.train.accumulation,
        clip_norm=config.optimizer.clip or None,
        compile="regions" if config.train.compile else False,
        dynamic=False,  # all batches have one shape
        gradient=gradient,
    )
    graph = config.train.graph
    if graph is None:
        one_gpu = str(config.device).startswith("cuda") and agreement.world() == 1
        graph = one_gpu and config.train.compile
    return graphed(step) if graph else step


def train(config: Config, watchdog: Watchdog) -> None:
    """data -> model -> loss -> step -> loop -> report"""
    begin = time.perf_counter()
    config, run, corpus, saved = prepare(config, watchdog)
    watchdog.at("building the model")
    settings, device = config.train, str(config.device)
    rank, world = agreement.rank(), agreement.world()
    with agreement.together():
        tokenizer = (
            Tokenizer.from_json(saved.files[TOKENIZER].decode())
            if saved
            else learn_tokenizer(config.vocabulary, corpus.train)
        )
        plain = model = make_model(config, tokenizer)
    share = (0, 1)
    if world > 1:
        on = meshes.mesh(**degrees(config.mesh), device=torch.device(device).type)
        share = meshes.data_rank(on)
        layout = DECODER_BY_TOKENS if config.mesh.sequence else DECODER
        dtype = getattr(torch, str(config.dtype))
        how: Any = {"reduce_dtype": torch.float32, "transport": config.mesh.transport}
        model = sharded(plain, layout, on, dtype=dtype, **how)
    with agreement.together():
        stream = make_batches(config, corpus, tokenizer, share)
        if saved:
            stream.restore(saved.extra["batches"])
        if isinstance(stream, StreamedBatches):
            stream.check()
    batches = Prefetch(stream, device)
    optimizer = make_optimizer(config.optimizer, settings.steps)
    step = make_train_step(config, model, optimizer)
    params = model.init(config.seed, device=torch.device(device).type if world > 1 else device)
    state = init_state(params, optimizer, random.key(config.seed, device=device))
    if saved:
        watchdog.at("loading the checkpoint")
        state = checkpoints.load(saved.path, state).state
    first = int(state.step)
    with agreement.together():
        if saved and not rank:
            (run / configs.FILE).write_text(configs.to_json(config), encoding="utf-8")
        elif not rank:
            configs.new_run(run, config, overwrite=config.overwrite)

    resume = launching.resume_command("recipes/pretrain.py", run)
    watchdog.remedy, watchdog.traces = f"; go on with: {resume}", run
    watchdog.at("opening the run")
    writer = checkpoints.Writer(run / CHECKPOINTS, keep_last=settings.keep)
    tracker = Tracker(
        run, settings.steps, name="pretrain", step=first, every=settings.log_every, rank=rank
    )
    meter = Meter(flops_per_token(plain, config.data.length) / peak_flops(device), world)

    def assess(params: Params) -> dict[str, float]:
        sizes = {"length": config.data.length, "batch": config.data.batch}
        loss_fn = make_loss(config, model, dropout=False)
        where = {**sizes, "share": share, "device": device}
        return validate(loss_fn, params, tokenizer, corpus.valid, **where)

    def save(count: int, score: float | None) -> None:
        watchdog.at(f"saving step {count}")
        tracker.flush()
        files = {TOKENIZER: tokenizer.to_json(), configs.FILE: configs.to_json(config)}
        places = agreement.from_all(batches.state())  # of a stream, each has its own
        merged = {name: value for place in places for name, value in place.items()}
        writer.save(count, state, extra={"batches": merged}, files=files, metric=score)

    with tracker:
        tracker.note(about(config, plain, tokenizer, corpus))
        trace = profiled(run / f"trace-{rank}.json.gz", settings.profile)
        stopping = errors.interruptible(launched=world > 1)
        with writer, stopping as stop, trace as traced:
            for count in range(first + 1, settings.steps + 1):
                with meter.waiting():
                    watchdog.at(f"the data of step {count}")
                    batch = next(batches)
                with meter.working():
                    watchdog.at(f"step {count}")
                    state, values = step(state, batch)
                    meter.tokens.append(values.pop("weight"))
                    tracker.log(count, values, tokens=meter.tokens[-1])
                    traced()
                    halt = agreement.highest(stop.received or 0)
                    if evaluate := count % settings.eval_every == 0 or count == settings.steps:
                        float(values["loss"])  # waits for the device
                if evaluate:
                    watchdog.at(f"validation after step {count}")
                    with tracker.paused():
                        scores = assess(state.params)
                        tracker.record(count, {**scores, **meter.read()})
                        save(count, -scores["valid/loss"])
                elif halt:
                    save(count, None)
                if halt and count < settings.steps:
                    writer.wait()
                    tracker.note(f"saved after step {count}; go on with: {resume}")
                    raise SystemExit(0 if halt == signal.SIGTERM else 128 + halt)
            watchdog.at("gathering the parameters")
            writer.wait()
            params = sharding.gather(state.params)
        batches.close()
        watchdog.close()
        if not rank:
            report(config, plain, tokenizer, params, corpus.valid, tracker)
            draw(tracker)
            tracker.note(f"{time.perf_counter() - begin:.0f} seconds; everything is in {run}")


def about(config: Config, model: Functional, tokenizer: Tokenizer, corpus: Corpus) -> str:
    size = sum(math.prod(shape) for shape in model.shapes.values())
    text = f"{len(corpus.train)} documents to train" if corpus.stream is None else "a stream"
    return (
        f"{text}, {len(corpus.valid)} documents to validate, {tokenizer.vocab_size} ids\n"
        f"{size:,} parameters, {config.device}, {config.dtype}, "
        f"{'compiled' if config.train.compile else 'eager'}, {agreement.world()} processes"
    )


def tell(
    config: Config,
    model: Functional,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    samples: int = 1,
) -> list[str]:
    """Whole texts that begin with the prompts, `samples` of each."""
    params = cast(params, getattr(torch, str(config.dtype)))
    sampling = Sampling(config.sample.temperature, top_p=config.sample.top_p)
    options = {"samples": samples, "sampling": sampling, "seed": config.seed}
    return continuations(model, params, tokenizer, prompts, **options)


def report(
    config: Config,
    model: Functional,
    tokenizer: Tokenizer,
    params: Params,
    held_out: list[str],
    tracker: Tracker,
) -> None:
    """Samples, judged if they are stories; leaves results.json and samples.txt."""
    number, own = config.sample.number, not (config.data.files or config.data.stream)
    kinds = {"free": tell(config, model, params, tokenizer, [""], number)}
    if own:
        prompts = [beginning(text) for text in held_out[:number]]
        kinds["begun"] = tell(config, model, params, tokenizer, prompts)
    records = tracking.read_metrics(tracker.run_dir / tracking.METRICS)
    last = [record for record in records if "valid/loss" in record][-1]
    results = {name: last[name] for name in ("valid/loss", "valid/bits_per_byte", "mfu")}
    for name, texts in kinds.items():
        origin = "without a beginning" if name == "free" else "from held-out beginnings"
        said = f"{len(texts)} samples {origin}"
        if own:
            share = shares(texts)
            results |= {f"judge/{name}/{rule}": value for rule, value in share.items()}
            kept = ", ".join(f"{rule} {share[rule]:.0%}" for rule in RULES if rule != "told")
            said += (
                f": the judge confirms {share['consistent']:.0%}; {share['told']:.0%} are told to "
                f"the end, of those keep {kept}"
            )
        tracker.note("\n".join([said, *(f"  {text}" for text in texts[: config.sample.show])]))
    (tracker.run_dir / "results.json").write_text(f"{json.dumps(results)}\n", encoding="utf-8")
    everything = "".join(f"{text}\n" for texts in kinds.values() for text in texts)
    (tracker.run_dir / "samples.txt").write_text(everything, encoding="utf-8")


def draw(tracker: Tracker) -> None:
    """Leaves the curves of the run."""
    panels = {
        "nats per token": {"loss": "training", "valid/loss": "validation"},
        "gradient norm": {"grad_norm": "before clipping"},
    }
    records = tracking.read_metrics(tracker.run_dir / tracking.METRICS)
    tracker.figure("curves", pictures.training_curves(records, panels))


def trained(config: Config) -> tuple[Functional, Params, Tokenizer]:
    """What the run `config` names has learned, from its latest checkpoint."""
    if launching.several():
        raise ValueError(f"{config.mode} works with one process: start it without torchrun")
    root = config.out / str(config.name) / CHECKPOINTS
    found = checkpoints.load(root)
    tokenizer = Tokenizer.from_json(found.files[TOKENIZER].decode())
    model = make_model(config, tokenizer)
    like = {"params": dict(model.shapes)}
    params = checkpoints.load(found.path, like, partial=True).state["params"]
    return model, {name: p.to(config.device) for name, p in params.items()}, tokenizer


def sample(config: Config) -> None:
    """Prints samples of a trained run, one a line."""
    config = checked(config)
    model, params, tokenizer = trained(config)
    prompts, number = [config.sample.prompt or ""], config.sample.number
    for text in tell(config, model, params, tokenizer, prompts, number):
        print(text)


def export(config: Config) -> None:
    """Writes model.safetensors, config.json and tokenizer.json into the run's folder `export`."""
    config = checked(config)
    model, params, tokenizer = trained(config)
    folder = config.out / str(config.name) / "export"
    settings: Any = model.skeleton.config
    ids: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    pretrained.save(folder, settings, params, tokenizer=tokenizer.to_json(), **ids)
    print(f"{len(params)} tensors in {folder}")


def main(config: Config) -> None:
    modes: dict[str, Callable[[Config], None]] = {"sample": sample, "export": export}
    if config.mode != "train":
        return modes[config.mode](config)
    options = {"device": config.device, "debug": config.debug}
    with launching.processes(config.mesh.timeout, **options) as watchdog:
        train(config, watchdog)


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:], str(__doc__)))
