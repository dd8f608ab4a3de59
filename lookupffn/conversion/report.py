"""A conversion's outcome: ``report.html`` for people, ``report.json`` for scripts, and a model card.

What was lost is said first: every measure in which something that is free or smaller does better.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lookupffn.files import atomic_write

TEACHER, STUDENT, PACKED = "teacher", "lookups", "lookups, packed"
NO_FFN, HALF, STATIC = "no feed-forward layers", "half of the layers", "static vectors"
ELSEWHERE = "teacher in "  # another engine than the runtime
PLOTTED = "1 x 32"


def models_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured of each model, by its name; the packed form where it could be measured whole."""
    found = {TEACHER: report["teacher"], STUDENT: report[STUDENT]}
    if "retrieval" in report.get(PACKED, {}):
        found[PACKED] = report[PACKED]
    return found | report.get("baselines", {})


def measures_of(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each measure, a number a model, the larger the better but of log perplexity."""
    found: dict[str, dict[str, float]] = {}
    for name, model in models_of(report).items():
        flat = {key: model[key] for key in (report["measure"], "retrieval", "log_perplexity") if key in model}
        flat |= {f"Spearman, {pair}": value for pair, value in model.get("spearman", {}).items()}
        flat |= {f"accuracy, {task}": value for task, value in model.get("classification", {}).items()}
        for measure, value in flat.items():
            found.setdefault(measure, {})[name] = value
    return found


def verdict(report: dict[str, Any]) -> list[str]:
    """What was lost, first where a baseline is better, then how much of the way from no FFN to the teacher was gone."""
    measures, student = measures_of(report), PACKED if PACKED in models_of(report) else STUDENT
    lines = []
    for baseline in report.get("baselines", {}):
        better = [m for m, v in measures.items() if _better(m, v.get(baseline), v.get(student))]
        if better:
            line = f"Better than the lookups: {baseline}, in {', '.join(better)}"
            times = report.get("timing", {}).get("us_per_token", {}).get(PLOTTED, {})
            faster = baseline in times and times[baseline] < times[PACKED]
            if faster:
                line += f"; and faster, {times[baseline]:.0f} us a token at {PLOTTED} for {times[PACKED]:.0f}"
            lines.append(f"{line}.")
    for measure, values in measures.items():
        if not {TEACHER, NO_FFN, student} <= values.keys():
            continue
        gap = values[TEACHER] - values[NO_FFN]
        if gap > 0 and measure != "log_perplexity":
            share = (values[student] - values[NO_FFN]) / gap
            lines.append(
                f"{measure}: {share:.0%} of the way from the model without feed-forward layers to the teacher."
            )
    lines += _times(report)
    for name, found in report.get("coverage", {}).items():
        if found["rare_tokens"] > 0.01:
            lines.append(
                f"{found['rare_tokens']:.1%} of the tokens of {name} are rare in the text that was distilled on: "
                "text of its domain would help."
            )
    return lines


def _times(report: dict[str, Any]) -> Iterator[str]:
    """The packed model's time beside that of the teacher in the fastest engine there is, whichever that is."""
    for shape, times in report.get("timing", {}).get("us_per_token", {}).items():
        dense = {name: time for name, time in times.items() if name not in models_of(report) or name == TEACHER}
        if PACKED in times and dense:
            engine = min(dense, key=dense.__getitem__)
            where = "this runtime" if engine == TEACHER else engine
            yield (
                f"{shape}: {times[PACKED]:.0f} us a token, {dense[engine] / times[PACKED]:.2f} times as fast as the "
                f"teacher in the fastest engine here ({where}, {dense[engine]:.0f} us)."
            )


def _better(measure: str, a: float | None, b: float | None) -> bool:
    if a is None or b is None or math.isnan(a) or math.isnan(b):
        return False
    return a < b if measure == "log_perplexity" else a > b


def rows_of(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table: headings, and a row a model; Spearman's correlations and accuracies beside the teacher's share."""
    measures = measures_of(report)
    times = report.get("timing", {}).get("us_per_token", {})
    headings = ["model", *measures, "FFN multiply-adds", *(f"us, {shape}" for shape in times)]
    rows = []
    for name, found in models_of(report).items():
        row = [name]
        for measure, values in measures.items():
            value, of = values.get(name), values.get(TEACHER)
            relative = measure.startswith(("Spearman", "accuracy")) and value is not None and of and name != TEACHER
            row.append("" if value is None else f"{value:.4f} ({value / of:.1%})" if relative else f"{value:.4f}")
        cost = found.get("ffn_multiply_adds", report[STUDENT]["ffn_multiply_adds"] if name == PACKED else None)
        row.append("" if cost is None else f"{cost:,}")
        row += [f"{shape[name]:.1f}" if name in shape else "" for shape in times.values()]
        rows.append(row)
    for engine in {engine for shape in times.values() for engine in shape} - models_of(report).keys():
        rows.append(
            [f"{ELSEWHERE}{engine}", *[""] * (len(measures) + 1), *(f"{s[engine]:.1f}" for s in times.values())]
        )
    return headings, rows


def write_report(report: dict[str, Any], folder: Path) -> None:
    """``report.json``, ``report.html`` and the model card, each whole or not at all."""
    atomic_write(folder / "README.md", _card(report))
    atomic_write(folder / "report.html", _page(report))
    atomic_write(folder / "report.json", json.dumps(_finite(report), indent=1, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    """A copy with None for every number that is not finite: JSON has none of these."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _card(report: dict[str, Any]) -> str:
    headings, rows = rows_of(report)
    lines = ["| " + " | ".join(row) + " |" for row in [headings, ["---"] * len(headings), *rows]]
    return "\n".join(
        [
            "---\nlibrary_name: lookupffn\n---\n",
            f"# {report['model']} with lookup feed-forward layers\n",
            *(f"- {line}" for line in verdict(report)),
            "",
            *lines,
            "",
            f"Distilled on {report['tokens']:,} tokens by lookupffn from {report['model']}; measured on "
            f"{report['texts']['held_out']:,} texts that were held out. Times are of {report['machine']['cpu']}, one "
            "thread.",
            "",
            "`import lookupffn`, then `from_pretrained` or `SentenceTransformer` of this folder; "
            "`lookupffn.Session` runs its packed form.",
            "",
        ]
    )


def _page(report: dict[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # texts and machine names are untrusted
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    headings, rows = rows_of(report)
    return (
        environment.get_template("report.html.j2")
        .render(
            report=report,
            verdict=verdict(report),
            headings=headings,
            rows=rows,
            figures=[figure for figure in (_front(report), _layers(report)) if figure],
            worst=report.get(PACKED, report[STUDENT]).get("worst", []),
        )
        .encode("utf-8", "backslashreplace")
        .decode("utf-8")
    )  # texts may hold lone surrogates


def _front(report: dict[str, Any]) -> str:
    """Quality against time in the runtime, a point a model."""
    times = report.get("timing", {}).get("us_per_token", {}).get(PLOTTED, {})
    measures = measures_of(report)
    measure = "retrieval" if "retrieval" in measures else report["measure"]
    points = {name: (times[name], value) for name, value in measures[measure].items() if name in times}
    if len(points) < 2:
        return ""
    figure, axes = _axes()
    for name, (x, y) in points.items():
        marker = "s" if name == PACKED else "o"
        axes.plot(x, y, marker, color="#b4451f" if name == PACKED else "#3a4a5a", markersize=8)
        axes.annotate(name, (x, y), xytext=(8, 4), textcoords="offset points")
    axes.set_xlabel(f"microseconds a token, {PLOTTED}, one thread")
    axes.set_ylabel(measure)
    axes.set_title("Quality against time in the runtime")
    axes.margins(0.2)
    return _svg(figure)


def _layers(report: dict[str, Any]) -> str:
    figure, axes = _axes()
    drawn = False
    for name, model in models_of(report).items():
        errors = model.get("errors_by_layer")
        if errors and name != TEACHER and len(errors) == len(report["teacher"]["errors_by_layer"]):
            axes.plot(range(1, len(errors) + 1), errors, "o-", label=name)
            drawn = True
    axes.set_xlabel("layer")
    axes.set_ylabel("squared error / variance")
    axes.set_title("Error of the hidden states behind each layer")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure) if drawn else ""


def _axes() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib
    from markupsafe import Markup

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "lookupffn", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return Markup(out.getvalue()[out.getvalue().index("<svg") :])  # whose labels are this file's own


def printed(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows for a terminal: a measure each, a column a model, which fits where a row a model would not."""
    headings, rows = rows_of(report)
    rows = [row for row in rows if not row[0].startswith(ELSEWHERE)]  # `verdict` has the fastest of these
    yield ("", *(row[0] for row in rows))
    for i, heading in enumerate(headings[1:], 1):
        yield (heading, *(row[i] for row in rows))
