"""The demo's outcome: for people `report.html`, one file that needs no other, for scripts `report.json`.

A number that is None, NaN or infinite is "not measured" on the page, and null in the JSON, which has no NaN.
"""

import json
import math
from pathlib import Path

from lookupffn.files import atomic_write, make_folder

from . import words

__all__ = ["verdict", "write_report"]


def write_report(report: dict, folder: Path) -> Path:
    """Write `report.json` and `report.html` into `folder`, each whole or not at all; returns the page's path.

    Raises ImportError where matplotlib or jinja2 is missing, before anything is written.
    """
    report = _finite(report)
    page = _page(report)
    folder = Path(folder)
    make_folder(folder)
    _write(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return _write(folder / "report.html", page)


def verdict(report: dict) -> list[str]:
    """What the run says of the lookup beside dense, for it or against it, in plain sentences."""
    return words.verdict(_finite(report))


def _finite(value):
    """A copy with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path, text):
    # Text read from files may hold lone surrogates, which UTF-8 cannot.
    atomic_write(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))
    return path


def _page(report):
    try:
        import jinja2

        from . import plots
    except ImportError as error:
        message = "the report needs matplotlib and jinja2: pip install 'lookupffn[lab]'"
        raise ImportError(message, name=error.name) from error

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # documents and machine names are untrusted text; only the figures are marked safe
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    dense, lookup = report["models"]["dense"], report["models"]["lookup"]
    buckets = lookup["buckets"]
    return environment.get_template("template.html.j2").render(
        report=report,
        words=words,
        token=_token,
        configs=_side_by_side(dense["config"], lookup["config"]),
        # A figure cannot reflow, so the page holds the curves twice and shows the one that fits.
        curves=[(fit, plots.curves(report, fit, width)) for fit, width in (("wide", 700), ("narrow", 350))],
        times=_times(dense, lookup, plots.time_bars),
        buckets=buckets,
        bucket_figures=[plots.bucket_use(buckets, "use"), plots.margins(buckets, "margins")] if buckets else [],
    )


def _times(dense, lookup, draw):
    """For each thing timed: its title, how it was timed and its bars."""
    for what, title in (("ffn", "FFN"), ("model", "Whole model")):
        for tokens in (1, 512):
            pair = {"dense": words.timing(dense, what, tokens), "lookup": words.timing(lookup, what, tokens)}
            bars = draw(pair, f"time-{what}-{tokens}")
            yield f"{title} {words.at_tokens(tokens)}", words.conditions(pair.values()), bars


def _side_by_side(dense, lookup):
    """Both configs as (name, dense, lookup) rows in the order of their keys."""
    both = dict(words.settings(dense)), dict(words.settings(lookup))
    return [(name, *(config.get(name, "–") for config in both)) for name in both[0] | both[1]]


def _token(text):
    """A token with its white space made visible."""
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
