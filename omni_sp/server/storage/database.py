"""The SQLite file of a data folder: one server owns it, several threads may use it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omni_sp.errors import ConfigError

DATABASE_NAME = "omni-sp.sqlite3"
_LOCK_NAME = "omni-sp.lock"
_VERSION = 1
_TABLES = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, name TEXT NOT NULL, media_type TEXT NOT NULL,
    size INTEGER NOT NULL, created_at REAL NOT NULL
);
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, status TEXT NOT NULL, expires_at REAL,
    document TEXT NOT NULL, picture BLOB
);
CREATE INDEX jobs_by_status ON jobs (status);
"""


class Database:
    """The database of a data folder, which is made, for this user alone, where it is missing.

    Raises:
        ConfigError: it cannot be written, another server uses it, or its database is damaged or of a newer Omni-SP.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._owner = _lock_folder(folder)
        except OSError as error:
            raise ConfigError(f"the data folder {folder} cannot be written: {error.strerror or error}") from error
        try:
            self._connection = _open(folder / DATABASE_NAME)
        except BaseException:
            os.close(self._owner)
            raise
        self._is_open = True

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Do all of the block or, on an error such as a full disk, none of it; other threads wait meanwhile."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, values: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        """The rows that a SELECT finds."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def close(self) -> None:
        """Close the file, and give up the folder. Idempotent."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                self._connection.close()
                os.close(self._owner)


def _lock_folder(folder: Path) -> int:
    """Open and lock the file that makes this process the folder's owner. The kernel unlocks it at the process's end."""
    owner = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(owner)
        raise ConfigError(f"another server uses the data folder {folder}: give each server its own") from None
    except BaseException:
        os.close(owner)
        raise
    return owner


def _open(path: Path) -> sqlite3.Connection:
    with contextlib.ExitStack() as stack:
        try:
            path.touch(mode=0o600)  # only its user may read the prompts in it, wherever the folder is
            connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10.0)
            stack.callback(connection.close)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # an accepted job is on disk, also after a power failure
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > _VERSION:
                raise ConfigError(f"{path} was written by a newer Omni-SP: use that one, or another data folder")
            if version == 0:
                connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {_VERSION}; COMMIT;")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{path} cannot be used ({error}): move it away, or give another data folder") from error
        stack.pop_all()  # from here on, the caller closes the connection
        return connection
