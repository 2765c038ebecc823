"""A run's configuration and its directory: frozen dataclasses, one JSON file, one command line.

A recipe declares a frozen dataclass of frozen dataclasses with a docstring under each field.
`parse` makes the command line of it (tyro), starting from a preset or from the configuration that
a run has left behind, so that `--name run` alone brings back every setting and any flag overrides
one.
"""

import dataclasses
import itertools
import json
import re
import shutil
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import tyro

from msfs_functional.compiling import why_not_compile

C = TypeVar("C")
FILE = "config.json"  # in the directory of every run


def to_json(config: Any) -> str:
    """The configuration as indented JSON; paths become strings."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str, ensure_ascii=False) + "\n"


def _value(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is Annotated:
        return _value(get_args(hint)[0], value, where)
    if get_origin(hint) in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not types.NoneType]
        return None if value is None else _value(options[0], value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where=f"{where}.")
    if get_origin(hint) is tuple:
        items = get_args(hint)
        kinds = [items[0]] * len(value) if items[-1] is Ellipsis else items
        return tuple(_value(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    return hint(value) if hint in (Path, float) else value


def from_dict(cls: type[C], values: Mapping[str, Any], *, where: str = "") -> C:
    """The dataclass `cls` that `to_json` has written; absent fields keep their defaults.

    Raises:
        ValueError: a key that `cls` does not have, named with its path (another version wrote it).
    """
    hints = get_type_hints(cls, include_extras=True)
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ValueError(
                f"configuration key {where}{name} is unknown to {cls.__name__}: it was written by"
                f" another recipe or version; remove the key or use the code that wrote it"
            )
    return cls(**{n: _value(hints[n], v, f"{where}{n}") for n, v in values.items()})


def load(cls: type[C], path: Path) -> C:
    """Reads a configuration file that `to_json` has written.

    Raises:
        ValueError: no such file, or a file that is not JSON or holds unknown keys.
    """
    try:
        return from_dict(cls, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: name a run that has been trained") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} is no configuration ({error}); restore it or train anew"
        ) from None


def option(args: Sequence[str], flag: str) -> str | None:
    """What follows `flag` in `args` (`--flag value` or `--flag=value`); the last one wins."""
    found = None
    for here, following in itertools.zip_longest(args, args[1:]):
        if here == flag:
            found = following
        elif here.startswith(f"{flag}="):
            found = here.removeprefix(f"{flag}=")
    return found


def starting_point(
    args: Sequence[str], presets: Mapping[str, C], *, modes: Collection[str] = ()
) -> C:
    """What options keep that `args` do not name: a preset's settings, or those of a run.

    A run's own settings come back when the first argument is one of `modes`, which work on a run,
    or with --resume; --out and --name say which one, without --name it is the newest.

    Args:
        presets: {name: configuration}, "default" among them; the configuration has the fields
            `mode`, `out` (folder of the runs), `name` and `overwrite`.
    """
    mode = args[0] if args and args[0] in modes else None
    chosen = presets.get(option(args, "--preset") or "default", presets["default"])
    if {"-h", "--help"} & set(args) or (mode is None and "--resume" not in args):
        return chosen
    out, name = Path(option(args, "--out") or "runs"), option(args, "--name")
    run = out / name if name else newest_run(out)
    saved: Any = load(type(chosen), run / FILE)
    changes = {"mode": mode or saved.mode, "out": out, "name": run.name, "overwrite": False}
    return dataclasses.replace(saved, **changes)


def parse(start: C, args: Sequence[str], *, description: str, prog: str) -> C:
    """The command line over a starting point; help shows that point's values as the defaults."""
    return tyro.cli(type(start), default=start, args=args, description=description, prog=prog)


def device(name: str | None) -> torch.device:
    """The device of that name; None: cuda where there is one, else cpu.

    Raises:
        ValueError: no such kind of device, or none of that number here.
    """
    count = torch.cuda.device_count()
    name = name or ("cuda" if count else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device ({name}) must be cpu, cuda or cuda:N") from None
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(f"--device ({name}) is not here, torch sees {count} GPUs: use cpu")
    return found


class Machine(NamedTuple):
    """Where and how a run computes; `note` says what the user should know of it, if anything."""

    device: str
    dtype: str
    compile: bool
    note: str = ""


def machine(name: str | None, dtype: str | None, compile: bool | None) -> Machine:
    """Fills in what the user left to the machine: a GPU computes compiled and in bfloat16, a CPU
    eager and in float32.

    Raises:
        ValueError: as `device`.
    """
    where = device(name)
    on_gpu = where.type == "cuda"
    reason = why_not_compile(where) if on_gpu and compile is None else None
    return Machine(
        str(where),
        dtype or ("bfloat16" if on_gpu else "float32"),
        on_gpu and not reason if compile is None else compile,
        f"training without torch.compile, because {reason}" if reason else "",
    )


def check_run(config: Any) -> None:
    """Refuses names that are paths, and going on with a run together with deleting it.

    Args:
        config: has the fields name, resume, overwrite.

    Raises:
        ValueError: one of the two.
    """
    if config.name and Path(config.name).name != config.name:
        raise ValueError(f"--name ({config.name}) must be a plain name: put folders into --out")
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite deletes it: give one of them")


def settled(config: C, prefix: str) -> C:
    """The configuration of a run with what was left to the machine filled in, threads set.

    Args:
        config: has the fields name, out, resume, overwrite, device, dtype, threads.
        prefix: of the names of runs, see `free_name`.

    Raises:
        ValueError: a name that is a path, options that exclude each other, as `device`.
    """
    check_run(config)
    given: Any = config
    where = machine(given.device, given.dtype, False)
    if given.threads:
        torch.set_num_threads(given.threads)
    name = given.name or free_name(given.out, prefix)
    return dataclasses.replace(given, name=name, device=where.device, dtype=where.dtype)


def check_numbers(config: Any, may_be_zero: Collection[str], *, where: str = "--") -> None:
    """Refuses what can never be right: negative numbers, and zeros where a size is meant.

    Args:
        config: dataclass of dataclasses; integers must be positive, other numbers not negative.
        may_be_zero: names of integer fields for which zero has a meaning.

    Raises:
        ValueError: names the first option out of range.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            check_numbers(value, may_be_zero, where=f"{where}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            least = 1 if isinstance(value, int) and field.name not in may_be_zero else 0
            if not value >= least:
                raise ValueError(f"{where}{name} ({value}) must be at least {least}")


def newest_run(out: Path) -> Path:
    """The directory in `out` whose configuration was written last.

    Raises:
        ValueError: there is none.
    """
    runs = sorted(out.glob(f"*/{FILE}"), key=lambda path: path.stat().st_mtime_ns)
    if not runs:
        raise ValueError(f"{out} holds no run: train one first, or name its folder with --out")
    return runs[-1].parent


def free_name(out: Path, prefix: str) -> str:
    """`prefix` with the next number that no run in `out` has: translate-1, translate-2, ..."""
    found = (re.fullmatch(rf"{re.escape(prefix)}-(\d+)", path.name) for path in out.glob("*"))
    return f"{prefix}-{1 + max((int(match[1]) for match in found if match), default=0)}"


def check_free(run: Path, *, overwrite: bool = False) -> None:
    """Refuses the directory of a new run if it holds anything (`overwrite`: but an earlier run).

    Raises:
        ValueError: it does.
    """
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return
    if not overwrite:
        raise ValueError(
            f"{run} exists and is not overwritten: choose another --name, go on with --resume, or "
            "delete it with --overwrite"
        )
    if not (run / FILE).is_file():
        raise ValueError(f"{run} is no run (it holds no {FILE}): choose another --name")


def new_run(run: Path, config: Any, *, overwrite: bool = False) -> None:
    """Makes the directory of a run, in place of an earlier one if allowed, with its configuration.

    Raises:
        ValueError: as `check_free`, which a recipe calls before work that takes long.
    """
    check_free(run, overwrite=overwrite)
    if run.exists():
        shutil.rmtree(run)
    run.mkdir(parents=True)
    (run / FILE).write_text(to_json(config), encoding="utf-8")
