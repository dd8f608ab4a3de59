"""Numbers into words: the verdict, the headline table, and how a quantity is written.

Every function takes a report whose NaN and infinities are already None, and writes None as "not measured".
"""

import math

NOT_MEASURED = "not measured"
SAME = "the same"


def microseconds(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def size(count):
    """A number of bytes in binary units, to three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            break
        count, unit = count / 1024, "TiB"
    return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.3g} {unit}"


def integer(value):
    return f"{value:,}"


def shown(value, show):
    return NOT_MEASURED if value is None else show(value)


def at_tokens(tokens):
    return "at 1 token" if tokens == 1 else f"at {tokens} tokens"


def timing(model, what, tokens):
    """The least time of `what` at that many tokens in any engine; one without numbers where there is none."""
    found = [t for t in model["timings"] if (t["what"], t["tokens"]) == (what, tokens)]
    none = dict.fromkeys(("us_per_token", "us_per_token_low", "us_per_token_high"))
    return min(found, key=lambda t: math.inf if t["us_per_token"] is None else t["us_per_token"], default=none)


def form(timing):
    """The engine, and the types that it computed in."""
    return f"{timing['engine']}, {timing['dtype']}" if "engine" in timing else NOT_MEASURED


def threads(timings):
    counts = sorted({t["threads"] for t in timings if "threads" in t})
    return f"{' and '.join(map(str, counts))} thread{'s' * (counts != [1])}" if counts else NOT_MEASURED


def conditions(timings):
    """How these were timed; several ways only where they differ."""
    ways = dict.fromkeys(form(t) for t in timings if "engine" in t)
    return f"{'; '.join(ways)}; {threads(timings)}" if ways else NOT_MEASURED


def forms(report, what):
    """Every form that was timed: model, engine, types, and at 1 and 512 tokens the time and "fastest" or nothing."""
    rows = []
    for name in ("dense", "lookup"):
        model = report["models"][name]
        found = [t for t in model["timings"] if t["what"] == what]
        for engine, dtype in dict.fromkeys((t["engine"], t["dtype"]) for t in found):
            cells = []
            for tokens in (1, 512):
                own = (t for t in found if (t["engine"], t["dtype"], t["tokens"]) == (engine, dtype, tokens))
                t = next(own, {"us_per_token": None})
                least = t["us_per_token"] is not None and t is timing(model, what, tokens)
                cells.append((shown(t["us_per_token"], microseconds), "fastest" if least else ""))
            rows.append((name, engine, dtype, cells))
    return rows


def change(dense, lookup, less, more):
    """The lookup's number beside dense's: "2.3 times fewer", "the same" or "not measured"."""
    if not dense or not lookup:
        return NOT_MEASURED
    factor = max(lookup / dense, dense / lookup)
    text = f"{factor:.2f}" if factor < 1.2 else f"{factor:.1f}" if factor < 100 else f"{factor:,.0f}"
    return SAME if text == "1.00" else f"{text} times {less if lookup < dense else more}"


def gap(dense, lookup, unit=" nats"):
    """Two log perplexities: "0.08 nats worse", "the same" or "not measured"."""
    if None in (dense, lookup):
        return NOT_MEASURED
    text = f"{abs(lookup - dense):.3f}"
    return SAME if text == "0.000" else f"{text}{unit} {'worse' if lookup > dense else 'better'}"


def verdict(report):
    dense, lookup = report["models"]["dense"], report["models"]["lookup"]

    def amounts(what, ffn, model, less, more):
        ffn, model = (change(dense[key], lookup[key], less, more) for key in (ffn, model))
        return f"{what}: {ffn} in the FFN, {model} in the whole model."

    return [
        *_quality(report),
        *_packed(lookup),
        _speed(dense, lookup, "ffn", "lookup FFN"),
        _speed(dense, lookup, "model", "whole lookup model"),
        amounts("Multiply-adds a token", "ffn_macs_per_token", "model_macs_per_token", "fewer", "more"),
        amounts("Bytes read a token", "ffn_bytes_per_token", "model_bytes_per_token", "fewer", "more"),
        amounts("Memory for weights", "ffn_parameters", "parameters", "less", "more"),
    ]


def _quality(report):
    models, entropy = report["models"], report["unigram_entropy"]
    dense, lookup = (models[name]["log_perplexity"] for name in ("dense", "lookup"))
    if None in (dense, lookup):
        return ["Log perplexity was not measured for both models: this run cannot say which is better."]
    text = gap(dense, lookup)
    text = "as good as dense" if text == SAME else f"{text} than dense"
    text = f"In this run the lookup model is {text} in log perplexity ({lookup:.3f} against {dense:.3f}, "
    text += f"over {shown(report['tokens_evaluated'], integer)} evaluated tokens)."
    errors = [models[name]["log_perplexity_standard_error"] for name in ("dense", "lookup")]
    if None not in errors and abs(lookup - dense) < (noise := 2 * math.hypot(*errors)):
        text += f" That is less than two standard errors ({noise:.3f}): no clear difference."
    if entropy is None:
        return [text]
    line = f"the unigram entropy of {entropy:.2f} nats"
    above = [name for name in ("dense", "lookup") if models[name]["log_perplexity"] >= entropy]
    if above:
        return [text, f"Not below {line}: {' and '.join(above)}. Token frequencies alone would do as well."]
    return [text, f"Both models end below {line}: they use the context, not token frequencies alone."]


def _packed(lookup):
    """The lookup model's log perplexity in the form that is timed, where that is the CPU engine's."""
    packed = lookup.get("packed")
    if not packed or None in (packed["log_perplexity"], lookup["log_perplexity"]):
        return []
    change = packed["log_perplexity"] - lookup["log_perplexity"]
    text = f"Packed for the CPU engine with {packed['dtype']} tables, the lookup model's log perplexity is "
    text += (
        f"{packed['log_perplexity']:.4f}, {abs(change):.4f} nats {'more' if change > 0 else 'less'} than as trained."
    )
    return [text]


def left_out(report):
    """Why some engines were not timed: (reason, engines) pairs."""
    by_reason = {}
    for one in report["engines_left_out"]:
        by_reason.setdefault(one["reason"], {})[one["engine"]] = None
    return by_reason.items()


def _speed(dense, lookup, what, name):
    clauses, timed, fastest = [], [], {"dense": [], "lookup": []}
    for tokens, than in ((512, " than the fastest dense"), (1, "")):
        pair = [timing(model, what, tokens) for model in (dense, lookup)]
        timed += pair
        text = change(*(t["us_per_token"] for t in pair), "faster", "slower")
        text = {SAME: "as fast as the fastest dense", NOT_MEASURED: NOT_MEASURED}.get(text, text + than)
        clauses.append(f"{text} {at_tokens(tokens)}")
        for forms, t in zip(fastest.values(), pair, strict=True):
            forms.append((form(t), at_tokens(tokens)))
    count = len({(t["engine"], t["dtype"]) for t in dense["timings"] if t["what"] == what})
    ways = [_ways(forms) for forms in fastest.values()]
    how = f"dense, the fastest of {count}: {ways[0]}; lookup: {ways[1]}; {threads(timed)}" if count else NOT_MEASURED
    return f"In this run the {name} is {' and '.join(clauses)} ({how})."


def _ways(forms):
    """`[("PyTorch eager, float32", "at 512 tokens"), ...]` in words, the sizes only where the forms differ."""
    if len({form for form, _ in forms}) == 1:
        return forms[0][0]
    return " and ".join(f"{form} {size}" for form, size in forms)


def headline(report):
    """The table: groups of (title, rows), a row being (label, two cells of (number, small print), change)."""
    models = [report["models"][name] for name in ("dense", "lookup")]

    def row(label, values, show, less, more, small=("", "")):
        cells = [(shown(value, show), note) for value, note in zip(values, small, strict=True)]
        return label, cells, change(*values, less, more)

    def counts(title, ffn, model, show=integer, which="one FFN"):
        pairs = ((which, ffn), ("whole model", model))
        return title, [row(label, [m[key] for m in models], show, "fewer", "more") for label, key in pairs]

    def times(label, what, tokens):
        pair = [timing(m, what, tokens) for m in models]
        ends = [(t["us_per_token_low"], t["us_per_token_high"]) for t in pair]
        small = ["" if None in both else "–".join(map(microseconds, both)) for both in ends]
        values = [t["us_per_token"] for t in pair]
        return row(f"{label} {at_tokens(tokens)}", values, microseconds, "faster", "slower", small)

    logs = [m["log_perplexity"] for m in models]
    errors = [shown(m["log_perplexity_standard_error"], "± {:.3f}".format) for m in models]
    label, cells, _ = row("log perplexity, nats", logs, "{:.3f}".format, "", "", errors)
    perplexities = [None if value is None else math.exp(min(value, 700)) for value in logs]
    quality = [
        (label, cells, gap(*logs, unit="")),
        row("perplexity", perplexities, "{:,.1f}".format, "lower", "higher"),
    ]
    timed = [(label, what, n) for label, what in (("one FFN", "ffn"), ("whole model", "model")) for n in (1, 512)]
    seconds = [m["training_seconds"] for m in models]
    return [
        (f"Quality on {shown(report['tokens_evaluated'], integer)} evaluated tokens", quality),
        ("Measured time a token, µs", [times(*each) for each in timed]),
        counts("Multiply-adds a token", "ffn_macs_per_token", "model_macs_per_token"),
        counts("Bytes read a token", "ffn_bytes_per_token", "model_bytes_per_token", size),
        counts("Parameters", "ffn_parameters", "parameters", which="all FFNs"),
        ("Training", [row("wall time", seconds, duration, "shorter", "longer")]),
    ]


def settings(mapping, parent=""):
    """Nested settings as flat (name, text) pairs, names in words."""
    for key, value in mapping.items():
        name = f"{parent}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from settings(value, f"{name}, ")
        elif name.endswith(" bytes") and value is not None:
            yield name.removesuffix(" bytes"), size(value)
        else:
            yield name, setting(value)


def setting(value):
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value))
    return integer(value) if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def percent(share):
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
