"""The hardware study for people: one page with its plots, which loads nothing."""

from pathlib import Path

from lookupffn.files import atomic_write, make_folder

BAND = 0.15  # of error, shown beside the line of equals


def write_study(records: list[dict], folder: Path, names: dict[str, str], command: str) -> Path:
    """Writes ``report.html`` of a study's records, and of what else was measured, into ``folder``; returns its path.

    ``records`` are those of ``hardware.study.study``, and where there are any of ``validate`` (``prediction``,
    ``summary``), ``simulate`` (``simulation``) and of ``benchmarks/ladder.py`` (``time``, ``count``). ``names`` are the
    machines' full names.

    Raises:
        ImportError: matplotlib or jinja2 is missing; nothing is written.
    """
    try:
        import jinja2

        from . import study_plots as plots
    except ImportError as error:
        message = "the report needs matplotlib and jinja2: pip install 'lookupffn[lab]'"
        raise ImportError(message, name=error.name) from error

    def of(what, **fields):
        return [r for r in records if r["what"] == what and all(r[name] == value for name, value in fields.items())]

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of machines are outsiders' text; only the figures are marked safe
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("study.html.j2").render(
        names=names,
        command=command,
        ratios=list(_ratios(of, plots)),
        predictions=of("prediction"),
        summaries=of("summary"),
        scatter=_scatter(of("prediction"), plots),
        features=of("feature"),
        feature_bars=_features(of("feature"), plots),
        sweeps=list(_sweeps(of, plots)),
        simulations=of("simulation"),
        ladder=_ladder(of("time"), of("count")),
    )
    make_folder(folder)
    path = folder / "report.html"
    atomic_write(path, page)
    return path


def _by_machine(records: list[dict], x: str, y: str) -> dict[str, list[tuple]]:
    series: dict[str, list[tuple]] = {}
    for r in records:
        series.setdefault(r["machine"], []).append((r[x], r[y]))
    return series


def _ratios(of, plots):
    """For each panel: its title and its figure."""
    labels = {"x_label": "", "y_label": "dense / lookup", "one": True}
    for n in (1, 64, 4096):
        series = _by_machine([r for r in of("sweep", over="width") if r["tokens"] == n], "hidden_size", "times_faster")
        title = f"Width of the model, {n:,} token{'s' * (n > 1)} a call"
        yield title, plots.lines(f"width-{n}", title, series, **labels | {"x_label": "hidden size"})
    for over, x, title, label in (
        ("tables", "num_tables", "Tables, width 768, 512 tokens a call", "tables"),
        ("tokens", "tokens", "Tokens a call, width 768", "tokens a call"),
    ):
        series = _by_machine(of("sweep", over=over), x, "times_faster")
        yield title, plots.lines(over, title, series, **labels | {"x_label": label})


def _scatter(predictions, plots):
    points = [(r["measured_us"], r["predicted_us"]) for r in predictions if "measured_us" in r]
    about = "Predicted against measured time of randomly sampled layers"
    return plots.scatter("validation", about, points, band=BAND) if points else None


def _features(features, plots):
    rows = [(r["feature"], r["times_faster"], r["least"], r["most"]) for r in features]
    about = "By how much each feature would speed the lookup up"
    return plots.ranges("features", about, rows, x_label="times faster") if rows else None


def _sweeps(of, plots):
    for number, figure in enumerate(dict.fromkeys(r["figure"] for r in of("hypothetical"))):
        series = _by_machine(of("hypothetical", figure=figure), "value", "lookup_us")
        title = f"Time against {figure}"
        yield title, plots.lines(f"sweep-{number}", title, series, x_label=figure, y_label="µs a token and layer")


def _ladder(times, counts) -> dict:
    """The rungs in order: microseconds by tokens, instructions and misses a token where they were counted."""
    sizes = sorted({r["tokens"] for r in times})
    counted = {r["rung"]: r for r in counts}
    rows = []
    for rung in dict.fromkeys(r["rung"] for r in [*times, *counts]):
        of_rung = {r["tokens"]: r["us_per_token"] for r in times if r["rung"] == rung and "us_per_token" in r}
        rows.append((rung, [of_rung.get(n) for n in sizes], counted.get(rung, {})))
    return {"sizes": sizes, "rows": rows}
