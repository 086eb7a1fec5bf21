"""What command lines share: flags as ``--flag value`` or ``--flag=value``, with dashes or underscores; exit codes."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
from collections.abc import Sequence

from omni_sp.errors import ConfigError

FAILED, BAD_INPUT, INTERRUPTED, UNREAD = 1, 2, 130, 141
"""Exit codes: a failure; bad input; Ctrl-C; nobody reads the output any more, as a shell says it of SIGPIPE."""
_FLAG = re.compile(r"(?P<name>--?[A-Za-z][\w.-]*)(?:=(?P<value>.*))?", re.DOTALL)


def split_flag(word: str) -> tuple[str, str | None]:
    """Split a flag from its value: ``--ring_degree=2`` into ``--ring-degree`` and ``2``, which is None without ``=``.

    A word that is no flag comes back as it is, with None.
    """
    match = _FLAG.fullmatch(word)
    return (word, None) if match is None else (match["name"].replace("_", "-"), match["value"])


def with_dashes(word: str) -> str:
    """Write a flag's name with dashes, ``--ring_degree=2`` as ``--ring-degree=2``; values stay as they are."""
    name, value = split_flag(word)
    return name if value is None else f"{name}={value}"


def close_unread() -> bool:
    """Point streams that nobody reads any more, as stdout under ``| head``, at nothing. Returns whether there is one.

    What is still in their buffers would fail once more when Python ends.
    """
    found = False
    for stream in (sys.stdout, sys.stderr):
        poll = select.poll()
        with contextlib.suppress(OSError, ValueError):  # closed, or no file at all
            poll.register(stream, 0)
            if poll.poll(0):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                found = True
    return found


class CommandLine:
    """Words of a command line, from which flags can be taken in any order.

    Args:
        words: the arguments, without the program's name.

    Attributes:
        rest: the words that nobody has taken yet, in their order.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.rest = list(words)

    def flags(self) -> list[str]:
        """The names of all flags, with dashes."""
        return [split_flag(word)[0] for word in self.rest if word.startswith("-")]

    def take_switch(self, name: str) -> bool:
        """Take a flag that has no value. Returns whether it was there.

        Raises:
            ConfigError: it has a value, which may say the opposite of the flag.
        """
        found = [word for word in self.rest if split_flag(word)[0] == name]
        for word in found:
            if split_flag(word)[1] is not None:
                raise ConfigError(f"{word}: {name} takes no value; leave it out where it is not wanted")
        self.rest = [word for word in self.rest if word not in found]
        return bool(found)

    def take_value(self, *names: str) -> str | None:
        """Take a flag, by any of its names, and its value: the last one given, or None.

        Raises:
            ConfigError: the flag is the last word and has no value.
        """
        found: str | None = None
        kept: list[str] = []
        words = iter(self.rest)
        for word in words:
            name, value = split_flag(word)
            if name not in names:
                kept.append(word)
                continue
            found = next(words, None) if value is None else value
            if found is None:
                raise ConfigError(f"{word} needs a value")
        self.rest = kept
        return found

    def take_number(self, *names: str) -> int | None:
        """Take a flag, by any of its names, and its value, a whole number; None where it is not given.

        Raises:
            ConfigError: the value is missing or is no whole number.
        """
        value = self.take_value(*names)
        if value is None:
            return None
        try:
            return int(value)
        except ValueError:
            raise ConfigError(f"{names[0]} {value}: give a whole number") from None

    def value_of(self, *names: str) -> str | None:
        """Read the value of a flag, which stays where it is."""
        return CommandLine(self.rest).take_value(*names)

    def number_of(self, *names: str) -> int | None:
        """Read the whole number that a flag has as its value; the flag stays where it is."""
        return CommandLine(self.rest).take_number(*names)

    def positional_after(self, word: str) -> str | None:
        """The word that follows a command's name, where it is no flag."""
        following = self.rest[self.rest.index(word) + 1 :] if word in self.rest else []
        return following[0] if following and not following[0].startswith("-") else None
