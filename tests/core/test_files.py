"""Files are old or new and never a mixture; paths in documents reach nothing outside their folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from curate.core import files
from curate.core.errors import Exit, UserError
from curate.core.files import canonical_json, file_sha256, inside, relative_to_root, sha256, write_atomic

OLD, NEW = b"old" * 3, b"new" * 70_001

CRASH = """
import os, sys
from pathlib import Path
from curate.core import files
target, new = Path(sys.argv[1]), b"new" * 70_001
calls = 0
def counted(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == fatal:
            os._exit(9)
        return real(*args, **kwargs)
    return call
for fatal in range(1, 99):
    target.write_bytes(b"old" * 3)
    pid = os.fork()
    if pid == 0:
        for name in ("open", "fsync", "replace", "close"):
            setattr(os, name, counted(getattr(os, name)))
        files.write_atomic(target, new)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        break
    print(fatal, "old" if target.read_bytes() == b"old" * 3 else "new" if target.read_bytes() == new else "torn")
"""


class Failing:
    """Stands for ``os`` and ``open`` in ``files``: the i-th call that touches the disk fails."""

    def __init__(self, fatal: int) -> None:
        self.fatal, self.calls = fatal, []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self.counted(real) if name in ("open", "fsync", "replace") else real

    def counted(self, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(real.__name__)
            if len(self.calls) == self.fatal:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)
        return call

    @contextmanager
    def opened(self, *args: Any) -> Iterator[SimpleNamespace]:
        with self.counted(open)(*args) as handle:
            yield SimpleNamespace(write=self.counted(handle.write), flush=self.counted(handle.flush),
                                  fileno=handle.fileno)


def test_write_atomic_failing_at_every_call_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, seen = tmp_path / "card.json", []
    for fatal in range(1, 99):
        target.write_bytes(OLD)
        failing = Failing(fatal)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", failing)
            patch.setattr(files, "open", failing.opened, raising=False)
            try:
                write_atomic(target, NEW)
            except UserError as err:
                assert err.exit_code == Exit.ENVIRONMENT and "No space left on device" in err.message
                seen.append(target.read_bytes())
            else:
                break
        assert [p.name for p in tmp_path.iterdir()] == ["card.json"], f"call {fatal} left a temporary file"
    assert target.read_bytes() == NEW
    assert failing.calls == ["open", "write", "flush", "fsync", "replace", "open", "fsync"]
    assert set(seen) == {OLD, NEW} and seen == sorted(seen, key=[OLD, NEW].index)


def test_write_atomic_killed_at_every_call_leaves_old_or_new(tmp_path: Path) -> None:
    out = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path / "card.json")], capture_output=True, text=True,
                         check=True)
    states = [line.split()[1] for line in out.stdout.splitlines()]
    assert set(states) == {"old", "new"} and states == sorted(states, reverse=True)


def test_write_atomic_makes_folders_and_names_what_is_in_the_way(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b" / "c.json", b"x")
    assert (tmp_path / "a" / "b" / "c.json").read_bytes() == b"x"
    for path in (tmp_path / "a" / "b" / "c.json" / "d.json", tmp_path / "a" / "b"):
        with pytest.raises(UserError, match="Could not write") as caught:
            write_atomic(path, b"y")
        assert caught.value.exit_code == Exit.ENVIRONMENT
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "c.json"]


@pytest.mark.parametrize("path", ["../x", "a/../../x", "a/..", "..", "/etc/passwd", "a\\..\\x", "C:\\x", "", "."])
def test_inside_refuses_paths_that_leave(tmp_path: Path, path: str) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="leaves the folder") as caught:
        inside(tmp_path, path)
    assert caught.value.exit_code == Exit.INTEGRITY


def test_inside_refuses_links_and_missing_files(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "real").mkdir(parents=True)
    outside.mkdir()
    for folder in (root / "real", outside):
        (folder / "x.jsonl").write_text("{}")
    (root / "folder").symlink_to(outside)
    (root / "file.jsonl").symlink_to(outside / "x.jsonl")
    (root / "within.jsonl").symlink_to(root / "real" / "x.jsonl")
    for path in ("folder/x.jsonl", "file.jsonl", "within.jsonl"):
        with pytest.raises(UserError, match="symbolic link"):
            inside(root, path)
    for path in ("real/y.jsonl", "nul\0byte", "é" * 200):
        with pytest.raises(UserError, match="is missing from"):
            inside(root, path)
    assert inside(root, "real/x.jsonl") == inside(root, "./real//x.jsonl") == root / "real" / "x.jsonl"


def test_relative_to_root_uses_slashes_and_refuses_what_lies_outside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path)
    assert relative_to_root(root / "a" / ".." / "b.jsonl", root) == "b.jsonl"
    for path in (tmp_path / "b.jsonl", root / ".." / "b.jsonl", root / "link" / "b.jsonl"):
        with pytest.raises(UserError, match="is not below"):
            relative_to_root(path, root)


def test_digests_depend_on_content_only(tmp_path: Path) -> None:
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == canonical_json({"a": "é", "b": [1, 2.5]}) == \
        '{"a":"é","b":[1,2.5]}'.encode()
    with pytest.raises(ValueError):
        canonical_json(float("nan"))
    (tmp_path / "big").write_bytes(NEW)
    assert file_sha256(tmp_path / "big") == sha256(NEW) == hashlib.sha256(NEW).hexdigest()
