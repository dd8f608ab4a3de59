"""Files: whole or as they were, and what cannot be written said by the path that was asked for."""

import json
import os
import pwd
import resource
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lookupffn import LookupConfig, LookupFFN, files, pack
from lookupffn.errors import InputError, WriteError
from lookupffn.runtime.packed import save_packed


@pytest.fixture
def small_disk():
    """No file may grow beyond 64 KiB here: what a full disk does, at a place that the test chooses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    files.atomic_write(path, "old")
    files.atomic_write(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"
    (tmp_path / "ordinary").touch(0o666)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
    (tmp_path / "ordinary").unlink()

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        files.atomic_write(path, "newer")
    assert path.read_text(encoding="utf-8") == "new ü"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("library", ["text", "safetensors", "torch"])
def test_a_full_disk_is_said_by_the_path_and_what_was_there_stays(tmp_path, small_disk, library):
    path, values = tmp_path / "file", torch.zeros(1 << 16)
    path.write_text("old")
    write = {
        "text": lambda file: file.write_text("x" * (1 << 17)),
        "safetensors": lambda file: save_file({"x": values}, file),
        "torch": lambda file: torch.save({"x": values}, file),
    }[library]
    reason = r"torch\.save failed, with [\d,]+ bytes free" if library == "torch" else "File too large"
    with pytest.raises(WriteError, match=rf"^{path} cannot be written: {reason}$"), files.atomic_replace(path) as file:
        write(file)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_packed_layers_on_a_full_disk_or_in_no_folder(tmp_path, small_disk):
    layer = pack(LookupFFN(LookupConfig(64, 64, num_tables=16)))
    assert layer.packed.numel() > 1 << 16
    for path, reason in ((tmp_path / "a", "File too large"), (tmp_path / "no" / "a", "No such file or directory")):
        with pytest.raises(WriteError, match=rf"^{path} cannot be written: {reason}$"):
            save_packed(layer, path)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "sub", Path("/proc/lookupffn")):
        with pytest.raises(WriteError, match=rf"^{path} cannot be written: (File exists|Not a dir|No such file)"):
            files.make_folder(path)
    with pytest.raises(WriteError, match=rf"^{tmp_path} cannot be written: Is a directory"):
        files.check_writable(tmp_path)
    with pytest.raises(WriteError, match="/proc/lookupffn"):
        files.check_writable(Path("/proc/lookupffn/a.jsonl"))
    files.check_writable(tmp_path / "new" / "a.jsonl")
    assert list((tmp_path / "new").iterdir()) == []


def test_other_errors_pass_through_as_they_are(tmp_path):
    for error in (FileNotFoundError(2, "No such file", "/elsewhere/x"), RuntimeError("shapes"), ValueError("x")):
        with pytest.raises(type(error)) as raised, files.writing(tmp_path / "a"):
            raise error
        assert raised.value is error


def test_json_lines(tmp_path):
    files.write_json_lines(tmp_path / "new" / "a.jsonl", [{"a": 1}, {"b": [2]}])
    lines = (tmp_path / "new" / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"a": 1}, {"b": [2]}]


# ---- Caches ----------------------------------------------------------------------------------------------------------


def test_the_folder_of_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOOKUPFFN_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert files.cache_folder() == Path("/home/someone/.cache/lookupffn")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert files.cache_folder() == Path("/caches/lookupffn")
    monkeypatch.setenv("LOOKUPFFN_CACHE", "~/here")
    assert files.cache_folder() == Path("/home/someone/here")


@pytest.fixture
def no_home(monkeypatch):
    """A user id without a name and without HOME, as `docker run --user 12345` gives."""

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "LOOKUPFFN_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_user_without_a_home_is_told_which_variable_to_set(no_home):
    with pytest.raises(InputError, match="no home folder: set LOOKUPFFN_CACHE"):
        files.cache_folder()


def test_without_a_home_tuning_keeps_nothing_and_works(no_home):
    if torch.get_num_threads() == 1:
        x = torch.randn(3, 32)
        layer = LookupFFN(LookupConfig(32, 32, num_tables=16))
        assert torch.equal(pack(layer, tune=True)(x), pack(layer)(x))
