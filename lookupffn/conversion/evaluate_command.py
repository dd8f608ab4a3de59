"""``lookupffn evaluate``."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from lookupffn.extras import require
from lookupffn.files import atomic_write, check_writable


def evaluate(
    model: Annotated[str, typer.Argument(help="sentence transformer, encoder, converted or packed model")],
    output: Annotated[Path, typer.Option(help="JSON file of all measures, and what is needed to repeat them")],
    pairs: Annotated[list[str] | None, typer.Option(help="FILE:first,second,score; repeat for more")] = None,
    labelled: Annotated[
        list[str] | None, typer.Option(help="FILE:text,label, told apart by the vectors; repeat for more")
    ] = None,
    texts: Annotated[
        str | None, typer.Option(help="for retrieval against --teacher: FILE of lines, or FILE:column of a table")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="another model, measured beside it")] = None,
    mteb: Annotated[list[str] | None, typer.Option(help="a task of MTEB; repeat for more")] = None,
    runtime: Annotated[
        bool, typer.Option("--runtime", help="run the packed form in the folder, though it has another")
    ] = False,
    pooling: Annotated[str | None, typer.Option(help="of encoders that do not say their own: mean or cls")] = None,
    encoding: Annotated[str, typer.Option(help="of text files")] = "utf-8",
):
    """Measures an embedding model on similarity, classification, retrieval and tasks of MTEB."""
    require("train", "lookupffn evaluate")
    from lookupffn.train.commands import quiet

    quiet()
    from lookupffn.conversion.evaluate import evaluate as run

    check_writable(output)
    result = run(
        model, pairs=pairs or [], labelled=labelled or [], texts=texts, teacher=teacher, mteb=mteb or [],
        runtime=runtime, pooling=pooling, encoding=encoding,
    )  # fmt: skip
    atomic_write(output, json.dumps(result, indent=1) + "\n")
    columns = [which for which in ("model", "teacher") if which in result]
    title = ", ".join(f"{which}: {result[which]['name']} ({result[which]['form']})" for which in columns)
    table = Table("measure", "data", box=box.SIMPLE, title=title)
    for heading in ("texts", *columns):
        table.add_column(heading, justify="right")
    for row in result["measures"]:
        cells = ["" if which not in row else _shown(row[which]) for which in columns]
        table.add_row(row["measure"], row["data"], f"{row['count']:,}" if row["count"] else "", *cells)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"all of it in [bold]{output}[/]")


def _shown(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"
