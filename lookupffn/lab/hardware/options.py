"""What the commands of the hardware study take, and how it is checked and read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lookupffn.errors import InputError
from lookupffn.lab.hardware.case import PROJECTION_DTYPES
from lookupffn.lab.hardware.model import Machine
from lookupffn.layer import LookupConfig

MachineOption = Annotated[
    str, typer.Option(help="here: measured now; a file that probe wrote; or a described processor, see `machines`")
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


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"{name} must be positive, not {value}")


def check_dtypes(names: Sequence[str]) -> None:
    for name in names:
        if name not in PROJECTION_DTYPES:
            raise InputError(f"dtype {name!r} is none of {', '.join(PROJECTION_DTYPES)}")


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


def machine_of(name: str, console: Console) -> Machine:
    """This machine probed, a described one, or one that was probed before."""
    from lookupffn.lab.hardware.described import describe, descriptions

    if name == "here":
        with console.status("probing") as status:
            return Machine.from_probe(probed(lambda what: status.update(f"probing: {what}")))
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
