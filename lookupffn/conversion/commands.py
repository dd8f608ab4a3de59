"""``lookupffn convert | evaluate``."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from lookupffn.conversion.evaluate_command import evaluate
from lookupffn.extras import require
from lookupffn.files import make_folder

app = typer.Typer()


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="folder or name of a sentence transformer or a Hugging Face encoder")],
    output: Annotated[Path, typer.Option(help="folder for the converted model and its report")],
    text: Annotated[
        str, typer.Option(help="text as of pretrain: file, folder or dataset; stdlib: its docstrings, always at hand")
    ] = "stdlib",
    text_column: Annotated[str, typer.Option(help="of .jsonl, .csv, .tsv and .parquet")] = "text",
    minutes: Annotated[float, typer.Option(help="of distillation; the baselines take about as long again")] = 10.0,
    tokens: Annotated[
        int | None, typer.Option(help="instead of minutes: tokens that each model is distilled on")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="convert as many layers as keep this share of the quality; each try takes the budget"),
    ] = None,
    pairs: Annotated[
        list[str] | None, typer.Option(help="to measure on: FILE:first,second,score; repeat for more")
    ] = None,
    labelled: Annotated[
        list[str] | None,
        typer.Option(help="to measure on: FILE:text,label, told apart by the vectors; repeat for more"),
    ] = None,
    table_type: Annotated[
        str, typer.Option(help="of the packed form's tables: int4, int8, bfloat16 or float32")
    ] = "int4",
    tables: Annotated[int, typer.Option(help="tables of a layer")] = 64,
    reads: Annotated[int, typer.Option(help="buckets probed in a table")] = 3,
    rank: Annotated[int, typer.Option(help="of the linear path beside the tables; 0 for none")] = 64,
    token_rows: Annotated[
        int, typer.Option(help="rows by ids beside them: 1 by a token's, 2 by that of pairs too")
    ] = 0,
    pooling: Annotated[str, typer.Option(help="of an encoder without one: mean or cls")] = "mean",
    max_length: Annotated[int, typer.Option(help="texts are cut to this many tokens")] = 128,
    in_pairs: Annotated[
        bool | None, typer.Option(help="read texts two by two; by default what a CrossEncoder's folder does")
    ] = None,
    baselines: Annotated[bool, typer.Option(help="distil what else one would pick, with the same budget")] = True,
    encoding: Annotated[str, typer.Option(help="of text files")] = "utf-8",
    skip_bad: Annotated[bool, typer.Option(help="leave out text that cannot be read, however much")] = False,
    seed: Annotated[int, typer.Option(help="of the split, the start and the order of texts")] = 0,
):
    """Replaces a pretrained encoder's feed-forward layers by lookups, and says what was lost.

    Called again after it was cut off, it goes on. Several processes: torchrun -m lookupffn convert ...
    """
    require("lab", "lookupffn convert")
    from lookupffn.train.commands import quiet

    quiet()
    from lookupffn.conversion.convert import convert as run
    from lookupffn.conversion.docstrings import docstrings
    from lookupffn.conversion.inputs import labelled_of, pairs_of
    from lookupffn.conversion.start import Shape
    from lookupffn.hf.loading import is_cross_encoder, load_encoder
    from lookupffn.train.data import EMBEDDED, documents

    make_folder(output)
    measured = [pairs_of(argument, encoding) for argument in pairs or []]
    told_apart = [labelled_of(argument, encoding) for argument in labelled or []]
    encoder, tokenizer = load_encoder(model, head=True)
    if in_pairs is None:
        in_pairs = is_cross_encoder(model)
    done = run(
        encoder,
        (line for _, line in docstrings())
        if text == EMBEDDED
        else documents(text, text_column=text_column, encoding=encoding, skip_bad=skip_bad),
        output,
        tokens=tokens,
        minutes=minutes,
        keep=keep,
        tokenizer=tokenizer,
        shape=Shape(num_tables=tables, reads=reads, rank=rank, token_rows=token_rows),
        pooling=pooling,
        max_length=max_length,
        in_pairs=in_pairs,
        pairs=measured,
        labelled=told_apart,
        baselines=baselines,
        tables=table_type,
        seed=seed,
    )
    if not int(os.environ.get("RANK", "0")):
        print_report(done.report, output, Console(soft_wrap=True))


def print_report(found: dict[str, Any], output: Path, console: Console) -> None:
    """What was lost, then the table: a measure a row, a model a column."""
    from lookupffn.conversion import report

    for line in report.verdict(found):
        console.print(line, style="bold" if line.startswith("Better") else "", highlight=False)
    shown = Table(box=box.SIMPLE, title=f"{found['model']}: what was kept, {found['tokens']:,} tokens each")
    headings, *rows = report.printed(found)
    for heading in headings:
        shown.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    console.print(f"Open [bold]{output / 'report.html'}[/]; the model is in [bold]{output}[/]")


app.command()(evaluate)
