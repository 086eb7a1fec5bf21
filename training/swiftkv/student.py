"""A SwiftKV model that begins as its teacher, and has the teacher's weights but for those that learn."""

from typing import Any

import torch
from torch import Tensor

from omni_sp.errors import UnsupportedModelError
from omni_sp.llm.swiftkv import config as configs
from omni_sp.llm.swiftkv import reference

__all__ = ["build_student", "export", "learning"]

_OWN = ("architectures", "model_type", "transformers_version", "dtype")  # what the student's configuration has itself


def build_student(teacher: Any, num_key_value_layers: int, key_value_group_size: int) -> Any:
    """Make the student; teacher and student share what does not learn, so it costs memory once.

    Queries of the late layers begin as the teacher's, keys and values of a group as the mean of the teacher's, and the
    norm of the shared hidden state as that of the first late layer's input.

    Args:
        teacher: A Llama, Qwen2 or Qwen3 of transformers; its weights stop to need gradients.
        num_key_value_layers: How many of the first layers keep keys and values of their own.
        key_value_group_size: How many of the other layers share keys and values.

    Raises:
        UnsupportedModelError: The teacher is of another class.
        ConfigError: The numbers do not fit the teacher.
    """
    name = type(teacher).__name__.removesuffix("ForCausalLM")
    if name not in reference.NAMES:
        known = ", ".join(f"{known}ForCausalLM" for known in reference.NAMES)
        raise UnsupportedModelError(f"{type(teacher).__name__} is none of {known}, of which SwiftKV models are made")
    entries = {key: value for key, value in teacher.config.to_dict().items() if key not in _OWN}
    config = getattr(configs, f"{name}SwiftKVConfig")(
        **entries, num_key_value_layers=num_key_value_layers, key_value_group_size=key_value_group_size
    )
    first, group = configs.late_layers(config)
    with torch.device("meta"):
        student = getattr(reference, f"{name}SwiftKVForCausalLM")(config)
    weights = dict(teacher.state_dict(keep_vars=True))
    weights["model.norm_swiftkv.weight"] = _learning(weights[f"model.layers.{first}.input_layernorm.weight"])
    for layer in range(first, config.num_hidden_layers):
        makes_keys = (layer - first) % group == 0
        members = range(layer, min(layer + group, config.num_hidden_layers)) if makes_keys else range(0)
        for which in "qkv":
            for part in ("weight", "bias"):
                name_of = f"model.layers.{{}}.self_attn.{which}_proj.{part}".format
                if name_of(layer) not in weights:
                    continue
                sources = [layer] if which == "q" else list(members)
                if sources:
                    own = f"model.layers.{layer}.self_attn.{which}_proj_swiftkv.{part}"
                    mean = torch.stack([weights[name_of(source)].float() for source in sources]).mean(0)
                    weights[own] = _learning(mean)
    known = student.state_dict().keys()
    student.load_state_dict({name: weight for name, weight in weights.items() if name in known}, assign=True)
    for name, weight in student.named_parameters():
        weight.requires_grad_(_learns(name))
    student.model.rotary_emb = teacher.model.rotary_emb  # its buffers are in no file
    student.tie_weights()
    return student.eval()


def _learning(weight: Tensor) -> Tensor:
    """A weight to learn, in float32: small steps would be lost in bfloat16."""
    return torch.nn.Parameter(weight.detach().clone().float())


def learning(student: Any) -> dict[str, Tensor]:
    """The weights that learn, by name."""
    return {name: weight for name, weight in student.named_parameters() if _learns(name)}


def _learns(name: str) -> bool:
    return "_swiftkv." in name


def export(student: Any, folder: Any, tokenizer: Any | None) -> None:
    """Save a student as its checkpoints are published: vLLM and `omni_sp.llm.swiftkv.reference` read the folder."""
    dtype = student.model.embed_tokens.weight.dtype
    state = {name: weight.to(dtype) for name, weight in student.state_dict().items()}
    student.config.dtype = dtype
    student.save_pretrained(folder, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
