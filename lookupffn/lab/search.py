"""A search by meaning over the docstrings of Python's standard library, in a converted model and in its teacher."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.markup import escape

from lookupffn.conversion.docstrings import summary
from lookupffn.runtime.session import Session

QUESTIONS = ("how many seconds until a deadline", "remove white space around text", "read rows of a spreadsheet file")
SHOWN = 5
LEAST_CHARACTERS = 25  # of what is worth finding


class Search:
    """Texts by the nearness of their vectors to a question's, by one session or more that share the texts."""

    def __init__(self, sessions: dict[str, Session], texts: list[str], console: Console):
        self.sessions, self.texts = sessions, texts
        self.vectors = {}
        for name, session in sessions.items():
            start = time.perf_counter()
            self.vectors[name] = session.embed(texts)
            seconds = time.perf_counter() - start
            console.print(f"{name}: {len(texts):,} texts to vectors in {seconds:.1f} s", highlight=False)

    def nearest(self, question: str, name: str) -> tuple[list[tuple[int, float]], float]:
        """Numbers of the nearest texts with their cosines, and the seconds that it took."""
        start = time.perf_counter()
        vector, vectors = self.sessions[name].embed([question])[0], self.vectors[name]
        cosines = vectors @ vector / np.maximum(np.linalg.norm(vectors, axis=1) * np.linalg.norm(vector), 1e-12)
        best = np.argsort(-cosines)[:SHOWN]
        return [(int(i), float(cosines[i])) for i in best], time.perf_counter() - start


def summaries(documented: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Names and first paragraphs of docstrings of what is public, each text once."""
    found: dict[str, str] = {}
    for name, text in documented:
        if "._" not in f".{name}" and len(line := summary(text)) >= LEAST_CHARACTERS:
            found.setdefault(line, name)
    return list(found.values()), list(found)


def answer(question: str, search: Search, names: list[str], console: Console) -> None:
    """Prints what the first session finds, and where the others rank it."""
    first, *others = search.sessions
    found, seconds = search.nearest(question, first)
    ranks: dict[str, dict[int, int]] = {
        other: {i: rank for rank, (i, _) in enumerate(search.nearest(question, other)[0], 1)} for other in others
    }
    console.print(f"\n[bold]{escape(question)}[/] [dim]{seconds * 1e3:.1f} ms[/]", highlight=False)
    for i, cosine in found:
        beside = "".join(
            f", {rank[i]}. of the {other}" if i in rank else f", not in the {other}'s {SHOWN}"
            for other, rank in ranks.items()
        )
        console.print(
            f"  {cosine:.2f}  [bold]{escape(names[i])}[/]  {escape(search.texts[i][:90])} [dim]{beside[2:]}[/]",
            highlight=False,
            no_wrap=True,
            overflow="ellipsis",
        )


def ask(search: Search, names: list[str], console: Console, questions: Iterable[str] = QUESTIONS) -> None:
    """Answers ``questions``, then those that are typed, where someone can type, until an empty line."""
    for question in questions:
        answer(question, search, names, console)
    if not sys.stdin.isatty():
        return
    console.print("\nAsk for a function of the standard library; an empty line ends.")
    while question := _typed(console):
        answer(question, search, names, console)


def _typed(console: Console) -> str:
    try:
        return console.input("[bold]search:[/] ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
