"""What the commands of the hardware study take, and how it is checked and read."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from lookupffn import machine, native
from lookupffn.errors import InputError, WriteError
from lookupffn.files import atomic_write, cache_folder, make_folder
from lookupffn.lab.hardware.case import DTYPES
from lookupffn.lab.hardware.model import Machine
from lookupffn.layer import LookupConfig

MachineOption = Annotated[
    str,
    typer.Option(help="here: probed, and the probe kept; a file that probe wrote; or a processor of `machines`"),
]
HiddenSize = Annotated[int, typer.Option(help="width of the model, D = E")]
IntermediateSize = Annotated[int | None, typer.Option(help="width inside the dense FFN [4 times the hidden size]")]
NumTables = Annotated[int, typer.Option(help="tables T")]
CodeBits = Annotated[int, typer.Option(help="bits of a code, tau")]
Reads = Annotated[int, typer.Option(help="buckets probed in a table, N")]
BlockSize = Annotated[int, typer.Option(help="edge of a BH4 block, b")]
Dtype = Annotated[str, typer.Option(help="of the tables: int8, bfloat16 or float32")]
Layers = Annotated[int, typer.Option(help="layers of the model, which take turns in the caches")]
Tokens = Annotated[list[int], typer.Option(help="tokens a call; repeat for more")]
Threads = Annotated[int, typer.Option(help="threads")]
Refresh = Annotated[bool, typer.Option("--refresh", help="probe this machine anew, though a probe is kept")]

PROBE_SECONDS = 50  # two cores of 2024


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"{name} must be positive, not {value}")


def check_dtypes(names: Sequence[str]) -> None:
    for name in names:
        if name not in DTYPES:
            raise InputError(f"dtype {name!r} is none of {', '.join(DTYPES)}")


def config_of(width: int, num_tables: int, code_bits: int, reads: int, block_size: int) -> LookupConfig:
    try:
        return LookupConfig(width, width, num_tables, code_bits, reads=reads, block_size=block_size)
    except ValueError as error:
        raise InputError(str(error)) from None


def cache_of(text: str) -> tuple[int, int]:
    """Bytes and ways of a cache."""
    size, slash, ways = text.partition("/")
    if not (slash and size.isdigit() and ways.isdigit()):
        raise InputError(f"--caches takes KiB/ways, as 32/8, not {text!r}")
    return int(size) * 2**10, int(ways)


def machine_of(name: str, console: Console, refresh: bool = False) -> Machine:
    """This machine as it was probed here, or is now; a described one, or one that was probed before."""
    from lookupffn.lab.hardware.described import describe, descriptions

    if name == "here":
        return Machine.from_probe(kept_probe(console, refresh))
    known = descriptions()
    if name in known:
        return describe(known[name])
    try:
        record = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"machine {name!r} is neither `here`, nor a file, nor one of {', '.join(known)}") from None
    except ValueError as error:
        raise InputError(f"{name} is no record of `lookupffn hardware probe`: {error}") from None
    try:
        return Machine.from_probe(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{name} is no record of `lookupffn hardware probe`: {error!r}") from None


@contextlib.contextmanager
def shown(what: str, console: Console) -> Iterator[Callable[[str], object]]:
    """Says what takes long, and each part of it that the block names: a line that changes, or lines of a pipe."""
    if console.is_terminal:
        with console.status(what) as status:
            yield lambda part: status.update(f"{what}: {part}")
    else:
        err = Console(stderr=True, soft_wrap=True)
        err.print(what)
        yield lambda part: err.print(f"  {part}")


def kept_probe(console: Console, refresh: bool = False) -> dict:
    """The record of this machine from the folder of caches, or probed and kept there; the console is told which.

    It holds for the processor, the kernels, torch's threads and the versions of both.
    """
    file = cache_folder() / "probe.json"
    key = [machine.cpu_name(), native.implementation(), torch.get_num_threads(), machine.versions()]
    if not refresh:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["key"] == key:
                console.print(f"this machine as it was probed on {kept['when']}, kept in {file}; --refresh probes anew")
                return kept["record"]
    what = f"probing this machine in three passes, about {PROBE_SECONDS} s where nothing else runs"
    with shown(what, console) as progress:
        record = probed(progress)
    when = datetime.datetime.now().isoformat(sep=" ", timespec="minutes")
    try:
        make_folder(file.parent)
        atomic_write(file, json.dumps({"key": key, "when": when, "record": record}) + "\n")
    except WriteError as error:
        console.print(f"the probe is not kept: {error}")
    return record


def probed(progress: Callable[[str], object], **options) -> dict:
    from lookupffn.lab.hardware.probe import probe

    try:
        return probe(progress, **options)
    except RuntimeError as error:
        raise InputError(str(error)) from None


def read_lines(file: str) -> list[dict]:
    try:
        found = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{file} holds no JSON lines: {error}") from None
    if not all(isinstance(record, dict) and "what" in record for record in found):
        raise InputError(f"{file}: each line must be a record with `what` it is")
    return found
