import json
import os

import pytest

from lookupffn.train import checkpoint


def make(folder, step, complete=True, content=b"weights"):
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(content)
    (path / "inner" / "state").write_bytes(b"x")
    if complete:
        checkpoint.mark_complete(path)
    return path


def test_the_latest_complete_one_is_chosen_by_number_and_incomplete_ones_never(tmp_path):
    make(tmp_path, 900)
    latest = make(tmp_path, 1000)
    make(tmp_path, 1100, complete=False)
    (tmp_path / "checkpoint-final").mkdir()
    assert checkpoint.latest_complete(tmp_path) == latest
    assert checkpoint.latest_complete(tmp_path / "nowhere") is None


@pytest.mark.parametrize("damage", ["truncate", "remove", "empty marker", "wrong marker"])
def test_a_damaged_checkpoint_does_not_count(tmp_path, damage):
    good, bad = make(tmp_path, 1), make(tmp_path, 2)
    if damage == "truncate":
        os.truncate(bad / "model.safetensors", 3)
    elif damage == "remove":
        (bad / "inner" / "state").unlink()
    else:
        (bad / checkpoint.MARKER).write_text("" if damage == "empty marker" else json.dumps([1]))
    assert checkpoint.latest_complete(tmp_path) == good


def test_old_ones_go_and_incomplete_ones_go_but_the_latest_stay(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    make(tmp_path, 4, complete=False)
    checkpoint.keep_latest(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
