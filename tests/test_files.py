import os
import stat

import pytest

from lookupffn import files


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
