"""Where programs look for the name of an adapter in a request."""

from dataclasses import dataclass

__all__ = ["LoRARequest"]


@dataclass(frozen=True)
class LoRARequest:
    """A LoRA adapter of a request.

    Attributes:
        lora_name: under which ``Omni(lora={name: path})`` has loaded it.
        lora_int_id: vLLM's number of it, which is not looked at.
        lora_path: where it is, which is read at the start alone.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""
