"""The store of finished files: whole or not at all, found by id alone, gone when old or too many, kept by a crash."""

from __future__ import annotations

import concurrent.futures
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from omni_sp.errors import ConfigError
from omni_sp.server.storage.database import DATABASE_NAME
from omni_sp.server.storage.file_store import FileStore


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[FileStore]:
    with closing(opened(tmp_path, clock)) as store:
        yield store


def opened(folder: Path, clock: Clock, **limits: Any) -> FileStore:
    return FileStore(folder, **{"max_age_s": 100.0, "max_total_bytes": 1000, "now": clock, **limits})


def put(store: FileStore, size: int = 10) -> str:
    return store.put(b"x" * size, suffix=".png", media_type="image/png")


def is_there(store: FileStore, file_id: str) -> bool:
    try:
        path, _ = store.path(file_id)
    except KeyError:
        return False
    return path.is_file()


def on_disk(folder: Path) -> set[str]:
    return {path.name for path in (folder / "files").iterdir()}


def test_what_is_put_is_found_by_its_id(store: FileStore, tmp_path: Path) -> None:
    file_id = store.put(b"picture", suffix=".webp", media_type="image/webp")
    path, media_type = store.path(file_id)
    assert (path.read_bytes(), media_type, path.suffix) == (b"picture", "image/webp", ".webp")
    assert on_disk(tmp_path) == {path.name}  # no part of a file stays behind
    store.delete(file_id)
    assert not path.exists()
    for missing in (file_id, "file-0"):
        with pytest.raises(KeyError):
            store.path(missing)
        with pytest.raises(KeyError):
            store.delete(missing)


def test_ids_are_long_and_never_the_same(store: FileStore) -> None:
    ids = {put(store, 1) for _ in range(50)}
    assert len(ids) == 50
    assert all(len(file_id) == len("file-") + 32 for file_id in ids)


@pytest.mark.parametrize(
    "asked", ["../omni-sp.sqlite3", "/etc/passwd", "", ".", "..", "%2e%2e", "file-\0", "' OR 1=1 --", "file-*"]
)
def test_an_id_is_never_a_path(store: FileStore, asked: str, tmp_path: Path) -> None:
    kept = put(store)
    # The name of a file that is there is no id either.
    for name in (asked, *on_disk(tmp_path)):
        with pytest.raises(KeyError):
            store.path(name)
        with pytest.raises(KeyError):
            store.delete(name)
    assert is_there(store, kept)


@pytest.mark.parametrize("suffix", ["", "png", ".PNG", "./x", "/../x", ".p n", ".123456789"])
def test_a_suffix_is_plain(store: FileStore, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="suffix"):
        store.put(b"x", suffix=suffix, media_type="image/png")
    assert on_disk(tmp_path) == set()


def test_old_files_go(store: FileStore, clock: Clock, tmp_path: Path) -> None:
    old = put(store)
    clock.now += 60
    young = put(store)
    clock.now += 39
    assert is_there(store, old)
    clock.now += 1
    assert not is_there(store, old)  # also before anybody sweeps
    assert len(on_disk(tmp_path)) == 2
    store.sweep()
    assert len(on_disk(tmp_path)) == 1
    assert is_there(store, young)


def test_files_without_a_limit_stay(tmp_path: Path, clock: Clock) -> None:
    with closing(opened(tmp_path, clock, max_age_s=None, max_total_bytes=None)) as store:
        kept = [put(store, 10_000) for _ in range(3)]
        clock.now += 1e9
        store.sweep()
        assert all(is_there(store, file_id) for file_id in kept)


def test_too_many_bytes_push_the_oldest_out(store: FileStore, tmp_path: Path) -> None:
    ids = [put(store, 300) for _ in range(5)]
    assert [is_there(store, file_id) for file_id in ids] == [False, False, True, True, True]
    exactly = put(store, 400)
    assert [is_there(store, file_id) for file_id in (*ids, exactly)] == [False] * 3 + [True] * 3
    assert len(on_disk(tmp_path)) == 3
    large = put(store, 5000)  # alone more than all may be: who has just got its id can fetch it
    assert on_disk(tmp_path) == {store.path(large)[0].name}
    small = put(store, 1)
    assert (is_there(store, large), is_there(store, small)) == (False, True)


def test_files_outlive_the_process_that_wrote_them(tmp_path: Path, clock: Clock) -> None:
    with closing(opened(tmp_path, clock)) as store:
        file_id = put(store)
    with closing(opened(tmp_path, clock)) as store:
        assert is_there(store, file_id)
    clock.now += 101
    with closing(opened(tmp_path, clock)):
        assert on_disk(tmp_path) == set()


def test_a_crash_leaves_nothing_behind(tmp_path: Path, clock: Clock) -> None:
    with closing(opened(tmp_path, clock)) as store:
        kept, gone = put(store), put(store)
        store.path(gone)[0].unlink()
    folder = tmp_path / "files"
    (folder / f"file-{'0' * 32}.mp4").write_bytes(b"moved, but its row was not written")
    (folder / ".part-abc").write_bytes(b"half")
    (folder / ".scratch-abc").mkdir()
    (folder / ".scratch-abc" / "video.mp4").write_bytes(b"half")
    (folder / "holiday.png").write_bytes(b"the user's own")
    (tmp_path / "file-of-the-user").write_bytes(b"too")
    with closing(opened(tmp_path, clock)) as store:
        assert on_disk(tmp_path) == {store.path(kept)[0].name, "holiday.png"}
        assert not is_there(store, gone)
    assert (tmp_path / "file-of-the-user").exists()


def test_what_cannot_be_written_is_not_kept(store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            put(store)
    assert on_disk(tmp_path) == set()
    with monkeypatch.context() as patch:
        patch.setattr(store, "_now", lambda: object())  # so that the row, which comes after the file, is refused
        with pytest.raises(sqlite3.ProgrammingError, match="type"):
            put(store)
    assert on_disk(tmp_path) == set()
    assert is_there(store, put(store))


def test_what_was_written_in_scratch_is_adopted(store: FileStore, tmp_path: Path) -> None:
    with store.scratch() as folder:
        (folder / "video.mp4").write_bytes(b"film")
        (folder / "unneeded").write_bytes(b"")
        file_id = store.adopt(folder / "video.mp4", suffix=".mp4", media_type="video/mp4")
    assert store.path(file_id)[0].read_bytes() == b"film"
    assert on_disk(tmp_path) == {store.path(file_id)[0].name}


def test_threads_may_share_it(tmp_path: Path, clock: Clock) -> None:
    with closing(opened(tmp_path, clock, max_total_bytes=None)) as store:
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            ids = list(threads.map(lambda _: put(store), range(40)))
            assert all(threads.map(lambda file_id: is_there(store, file_id), ids))
            list(threads.map(store.delete, ids))
        assert on_disk(tmp_path) == set()


def test_others_cannot_read_the_folder(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "made" / "here"
    with closing(opened(folder, clock)) as store:
        put(store)
        assert folder.stat().st_mode & 0o077 == 0
        assert (folder / "files").stat().st_mode & 0o077 == 0
        assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())


def test_a_folder_has_one_server(store: FileStore, tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(ConfigError, match="another server"):
        opened(tmp_path, clock)
    program = f"import pathlib, omni_sp.server.storage.database as d; d.Database(pathlib.Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "another server" in done.stderr
    assert is_there(store, put(store))
    store.close()
    store.close()
    opened(tmp_path, clock).close()


def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        opened(tmp_path / "file", clock)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / DATABASE_NAME).write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match=DATABASE_NAME):
        opened(damaged, clock)
    (damaged / DATABASE_NAME).unlink()
    opened(damaged, clock).close()  # nothing of the failure holds the folder


def test_a_newer_database_is_left_alone(tmp_path: Path, clock: Clock) -> None:
    with closing(opened(tmp_path, clock)) as store, store.database.transaction() as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="newer"):
        opened(tmp_path, clock)
