"""``lookupffn convert``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from lookupffn.errors import InputError
from lookupffn.extras import require
from lookupffn.files import make_folder

app = typer.Typer()


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="folder or name of a sentence transformer or a Hugging Face encoder")],
    output: Annotated[Path, typer.Option(help="folder for the converted model and its report")],
    text: Annotated[
        str, typer.Option(help="text as of pretrain: file, folder or dataset; stdlib is at hand")
    ] = "stdlib",
    text_column: Annotated[str, typer.Option(help="of .jsonl, .csv, .tsv and .parquet")] = "text",
    minutes: Annotated[float, typer.Option(help="of distillation, the baselines' among them")] = 10.0,
    tokens: Annotated[int | None, typer.Option(help="instead of minutes: tokens for each model")] = None,
    pairs: Annotated[
        list[str] | None, typer.Option(help="to measure on: FILE:first,second,score; repeat for more")
    ] = None,
    tables: Annotated[int, typer.Option(help="tables of a layer")] = 64,
    reads: Annotated[int, typer.Option(help="buckets probed in a table")] = 3,
    rank: Annotated[int, typer.Option(help="of the linear path beside the tables; 0 for none")] = 64,
    baselines: Annotated[bool, typer.Option(help="distil what else one would pick, with the same budget")] = True,
    encoding: Annotated[str, typer.Option(help="of text files")] = "utf-8",
    skip_bad: Annotated[bool, typer.Option(help="leave out text that cannot be read, however much")] = False,
    seed: Annotated[int, typer.Option(help="of the split, the start and the order of texts")] = 0,
):
    """Replaces a pretrained encoder's feed-forward layers by lookups, and says what was lost."""
    if (tokens is not None and tokens < 1) or not minutes > 0:
        raise InputError(f"tokens and minutes must be positive, not {tokens} and {minutes}")
    require("train", "lookupffn convert")
    from lookupffn.train.commands import quiet

    quiet()
    from lookupffn.convert.conversion import convert as run
    from lookupffn.convert.start import Shape
    from lookupffn.hf.loading import load_encoder
    from lookupffn.train.data import documents

    make_folder(output)
    console = Console(soft_wrap=True)
    measured = [_pairs(argument, encoding) for argument in pairs or []]
    encoder, tokenizer = load_encoder(model)
    done = run(
        encoder,
        documents(text, text_column=text_column, encoding=encoding, skip_bad=skip_bad),
        output,
        tokens=tokens,
        minutes=minutes,
        tokenizer=tokenizer,
        shape=Shape(num_tables=tables, reads=reads, rank=rank),
        pairs=measured,
        baselines=baselines,
        seed=seed,
        say=lambda name, p: console.print(
            f"{name}: {p.tokens:,} of {p.of:,} tokens, cosine {p.cosine:.4f}, loss {p.loss:.3f}, {p.seconds:.0f} s",
            highlight=False,
        ),
    )
    _print(console, done.report)
    console.print(f"report in [bold]{output / 'report.json'}[/], packed model in [bold]{output / 'packed'}[/]")


def _pairs(argument: str, encoding: str) -> Any:
    from lookupffn.convert.conversion import Pairs
    from lookupffn.train.labelled import read_labelled

    path, _, names = argument.rpartition(":")
    columns = names.split(",")
    if not path or len(columns) != 3:
        raise InputError(f"--pairs {argument!r} is not FILE:first,second,score")
    found = read_labelled(path, ",".join(columns[:2]), columns[2], "regression", encoding=encoding)
    first, second = zip(*found.texts, strict=True)
    return Pairs(Path(path).stem, list(first), list(second), [float(score) for score in found.labels])


def _print(console: Console, report: dict[str, Any]) -> None:
    models = {"teacher": report["teacher"], "lookups": report["student"], "lookups, packed": report["packed"]}
    models |= report.get("baselines", {})
    beaten = [
        name
        for name, found in report.get("baselines", {}).items()
        if found["retrieval"] > report["packed"]["retrieval"]
    ]
    if beaten:  # what was lost is said first
        console.print(f"[bold red]Better at retrieval than the lookups: {', '.join(beaten)}[/]")
    table = Table(box=box.SIMPLE, title=f"{report['model']}: what was kept, {report['tokens']:,} tokens each")
    for heading in ("model", "cosine to teacher", "retrieval", *report["teacher"]["spearman"], "FFN multiply-adds"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, found in models.items():
        kept = [f"{found['spearman'][p]:.4f}" for p in report["teacher"]["spearman"]]
        multiply_adds = found.get("ffn_multiply_adds")
        table.add_row(
            name,
            f"{found['cosine']:.4f}",
            f"{found['retrieval']:.4f}",
            *kept,
            "" if multiply_adds is None else f"{multiply_adds:,}",
        )
    console.print(table)
