"""The command line as it is typed."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lookupffn.__main__ import _assignment, _read_config, app, main
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
        (["demo", "--minutes=-1"], "minutes and steps must be positive, not -1.0"),
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
    config = PretrainConfig(**_read_config("small-512"))
    assert (config.steps, config.batch_size, config.sequence_length) == (250_000, 256, 512)
    assert (config.learning_rate, config.warmup_steps, config.weight_decay) == (1e-4, 10_000, 0.01)
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert config.table_learning_rate_multiplier == 1.0


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- 3", "must hold settings")])
def test_a_bad_config_file_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        _read_config(str(path))


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


def test_the_recipes_of_the_experiments_can_be_planned():
    from lookupffn.lab.compare import plan

    for name in ("quality", "levers", "imdb-small"):
        file = _read_config(str(Path(__file__).parents[1] / "experiments" / f"{name}.yaml"))
        runs = plan(file["recipes"], file["common"], list(file["recipes"]), [0], [file["common"]["steps"]], "out")
        assert len(runs) == len(file["recipes"])


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
