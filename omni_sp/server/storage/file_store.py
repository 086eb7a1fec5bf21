"""Finished pictures and videos on disk, to be fetched by an unguessable id until they are too old or too many."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from omni_sp.server.storage.database import Database

_SUFFIX = re.compile(r"\.[a-z0-9]{1,8}")
_OURS = re.compile(r"file-[0-9a-f]{32}\.[a-z0-9]{1,8}|\.(part|scratch)-.*")


class FileStore:
    """Files in a folder, with an index in its database.

    A file appears when it is complete, never before. It outlives the process, and goes when it is older than
    ``max_age_s``, or when all files together are larger than ``max_total_bytes``: the oldest first, the newest never;
    None is no limit. They lie in ``files/`` below the folder, and nothing else there is touched. May be used from
    several threads.

    Args:
        folder: which is opened at once, or refused; None for a temporary one, from ``open()`` to ``close()``.
    """

    database: Database

    def __init__(
        self,
        folder: Path | None,
        *,
        max_age_s: float | None,
        max_total_bytes: int | None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._max_age_s, self._max_total_bytes, self._now = max_age_s, max_total_bytes, now
        self._is_temporary = folder is None
        if folder is not None:
            self._open(folder)

    def open(self) -> None:
        """Make the temporary folder; nothing where a folder was given."""
        if self._is_temporary:
            self._open(Path(tempfile.mkdtemp(prefix="omni-sp-")))

    def _open(self, folder: Path) -> None:
        self._folder = folder / "files"
        with contextlib.ExitStack() as stack:
            if self._is_temporary:
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
            self.database = Database(folder)
            stack.callback(self.database.close)
            self._folder.mkdir(exist_ok=True, mode=0o700)
            self._reconcile()
            stack.pop_all()  # from here on, close() does it

    def put(self, data: bytes, *, suffix: str, media_type: str) -> str:
        """Keep these bytes under a name with this suffix, and return their id. On an error nothing is kept."""
        part = self._folder / f".part-{secrets.token_hex(8)}"
        try:
            part.write_bytes(data)
            return self.adopt(part, suffix=suffix, media_type=media_type)
        finally:
            part.unlink(missing_ok=True)

    def adopt(self, source: Path, *, suffix: str, media_type: str) -> str:
        """Move a finished file from ``scratch()`` into the store, and return its id. On an error nothing is kept."""
        if not _SUFFIX.fullmatch(suffix):
            raise ValueError(f"suffix={suffix!r}: give one such as '.png'")
        file_id = f"file-{secrets.token_hex(16)}"
        target = self._folder / f"{file_id}{suffix}"
        _sync(source)
        size = source.stat().st_size
        os.replace(source, target)
        try:
            with self.database.transaction() as connection:
                connection.execute(
                    "INSERT INTO files (id, name, media_type, size, created_at) VALUES (?, ?, ?, ?, ?)",
                    (file_id, target.name, media_type, size, self._now()),
                )
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        self.sweep()
        return file_id

    def path(self, file_id: str) -> tuple[Path, str]:
        """Where a file lies, and its media type; KeyError where it is not kept. The id never becomes part of a path."""
        found = self.database.rows("SELECT name, media_type, created_at FROM files WHERE id = ?", (file_id,))
        if found:
            name, media_type, created_at = found[0]
            assert isinstance(created_at, float), "the column is REAL"
            path = self._folder / str(name)
            if not self._is_old(created_at) and path.is_file():
                return path, str(media_type)
        raise KeyError(file_id)

    def delete(self, file_id: str) -> None:
        """Remove a file; KeyError where there is none of that id."""
        if not self._drop("id = ?", (file_id,)):
            raise KeyError(file_id)

    def sweep(self) -> None:
        """Remove files that are too old or too many. Every new file does it; call it now and then besides."""
        if self._max_age_s is not None:
            self._drop("created_at <= ?", (self._now() - self._max_age_s,))
        if self._max_total_bytes is not None:
            # Sizes are added up from the newest file on; files beyond the limit go.
            added = "SELECT number, SUM(size) OVER (ORDER BY number DESC) AS total FROM files"
            too_much = f"number IN (SELECT number FROM ({added}) WHERE total > ?)"
            self._drop(f"{too_much} AND number < (SELECT MAX(number) FROM files)", (self._max_total_bytes,))

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a folder beside the files, to write what is to be adopted. It is removed at the end of the block."""
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=self._folder, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def close(self) -> None:
        """Give up the folder, and remove a temporary one. Idempotent."""
        self.database.close()
        if self._is_temporary:
            shutil.rmtree(self._folder.parent, ignore_errors=True)

    def _is_old(self, created_at: float) -> bool:
        return self._max_age_s is not None and created_at <= self._now() - self._max_age_s

    def _drop(self, condition: str, values: tuple[object, ...]) -> int:
        """Remove the files that a condition finds, from the index first, so that every id in it has its file."""
        with self.database.transaction() as connection:
            names = [name for (name,) in connection.execute(f"SELECT name FROM files WHERE {condition}", values)]
            connection.executemany("DELETE FROM files WHERE name = ?", [(name,) for name in names])
        for name in names:
            (self._folder / name).unlink(missing_ok=True)
        return len(names)

    def _reconcile(self) -> None:
        """Make index and folder agree after a crash: forget files that are gone, and remove files that have no id."""
        known = {str(name) for (name,) in self.database.rows("SELECT name FROM files")}
        present = {entry.name for entry in self._folder.iterdir()}
        with self.database.transaction() as connection:
            connection.executemany("DELETE FROM files WHERE name = ?", [(name,) for name in known - present])
        for name in present - known:
            if _OURS.fullmatch(name):
                _remove(self._folder / name)
        self.sweep()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(path: Path) -> None:
    """Write the bytes to disk, before the file gets its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
