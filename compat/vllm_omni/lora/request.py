"""Where programs look for the name of an adapter in a request."""

import re
from dataclasses import dataclass
from pathlib import PurePath

__all__ = ["LoRARequest"]


@dataclass(frozen=True)
class LoRARequest:
    """A LoRA adapter of a request.

    Attributes:
        lora_name: under which ``Omni(lora={name: path})`` has loaded it, or the name of the file or folder that
            ``Omni(lora_path=path)`` has loaded, without its ending.
        lora_int_id: vLLM's number of it, which is not looked at.
        lora_path: where it is, which is read at the start alone.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""


def adapter_name(name: str) -> str:
    """The name of an adapter as Omni-SP takes it: what it cannot hold becomes a dash."""
    return re.sub("[^A-Za-z0-9_-]", "-", name)


def lora_of_path(path: str) -> tuple[str, str]:
    """The name by which requests know an adapter that was given by its path alone, and the path."""
    return adapter_name(PurePath(path).stem), path
