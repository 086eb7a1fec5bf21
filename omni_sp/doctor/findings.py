"""What the doctor says: findings, each with what it means and what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")
NOTHING = "nothing to do"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, measured or proven.

    Attributes:
        level: "ok"; "note" for what is worth knowing; "warning" for what costs speed or may fail; "error" for what
            fails, or gives wrong numbers.
        subject: what was looked at, such as "topology".
        what: what was found, with its values.
        meaning: what follows from it.
        remedy: what to do.
    """

    level: Level
    subject: str
    what: str
    meaning: str
    remedy: str = NOTHING

    def as_dict(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self)
