"""Trained speculators as folders, in the layout of Arctic Inference and Arctic Training: read, checked and written.

A folder holds a ``config.json``, and weights as safetensors or ``pytorch_model.bin``, whose names may begin with
``speculator.``. Two forms of the configuration are in use. With ``input_hidden_dim``, ``method`` says which kind it is,
and ``emb_dim``, ``proj_dim`` and ``inner_dim`` are its width. Without, it is an MLP, and ``emb_dim`` is the width of
the model's hidden states.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from omni_sp.errors import ConfigError
from omni_sp.llm.model_files import model_file, model_folder
from omni_sp.validation import require_int, shown

_LSTM, _MLP = "ArcticLSTMSpeculatorPreTrainedModel", "ArcticMLPSpeculatorPreTrainedModel"
ARCHITECTURES = (_LSTM, _MLP, "MLPVariantSpeculatorPreTrainedModel", "MLPSpeculatorPreTrainedModel")
"""What the config.json of a speculator may name."""
_KINDS: dict[str, Literal["mlp", "lstm"]] = {"sum_rnn": "mlp", "sum_lstm": "lstm"}
_GATES = ("forget", "input", "output", "cell")
_FILES = ("config.json", "*.safetensors", "pytorch_model*.bin")
_SEQUENTIAL = re.compile(r"^(emb|proj|ln)\.(\d+)\.0\.")  # a sequence of one layer


@dataclass(frozen=True, kw_only=True)
class SpeculatorConfig:
    """What a speculator is.

    Attributes:
        kind: "mlp" (arXiv 2404.19124), or "lstm", which has gates and a cell.
        n_predict: tokens that it drafts.
        vocab_size: number of tokens that it knows.
        input_width: width of the model's hidden states.
        width: of its own states, and of its embeddings.
        tie_weights: the same weights for each token of a draft, but for the first projection.
        tie_gates: the gates of an LSTM share an embedding.
        scale_input: hidden states are normalised first.
        base_architectures: the models that it was trained for; empty where the folder does not say.
    """

    kind: Literal["mlp", "lstm"]
    n_predict: int
    vocab_size: int
    input_width: int
    width: int
    tie_weights: bool = True
    tie_gates: bool = True
    scale_input: bool = True
    base_architectures: tuple[str, ...] = ()

    @property
    def gates(self) -> int:
        """How many times its width an embedding and a projection of the module are wide."""
        return len(_GATES) if self.kind == "lstm" else 1

    @property
    def embedding_width(self) -> int:
        """The width of an embedding: gates that share one have it once."""
        return self.width if self.tie_gates else self.width * self.gates

    def stages(self, name: str) -> int:
        """How many layers of a name there are: "emb", "proj", "ln", "cell_ln", "state_ln" or "head"."""
        tied = 2 if name == "proj" else 1
        return min(tied, self.n_predict) if self.tie_weights else self.n_predict

    def require_fits(self, speculator: str, *, vocab_size: int, width: int, architecture: str) -> None:
        """Raise ConfigError where a model has another vocabulary or width, or is not what it was trained for."""
        for name, own, of_model in (
            ("vocab_size", self.vocab_size, vocab_size),
            ("width of hidden states", self.input_width, width),
        ):
            if own != of_model:
                raise ConfigError(
                    f"the speculator {speculator} has the {name} {own}, and the model {of_model}: give the speculator "
                    "that was trained for this model"
                )
        if self.base_architectures and architecture not in self.base_architectures:
            raise ConfigError(
                f"the speculator {speculator} was trained for {', '.join(self.base_architectures)} (base_model_archs "
                f"in its config.json), and the model is a {architecture}: give the speculator that was trained for it"
            )


def read_config(speculator: str | os.PathLike[str]) -> SpeculatorConfig:
    """The configuration of a speculator, a folder or an id on the hub.

    Raises:
        ConfigError: there is none, or it describes something else than is handled here.
    """
    where = f"{os.fspath(speculator)}/config.json"
    try:
        content = json.loads(model_file(speculator, "config.json").read_text(encoding="utf-8"))
    except Exception as error:  # which class says "no network" depends on the hub client's version
        raise ConfigError(f"{where} cannot be read ({error}): name a trained speculator's folder or hub id") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: a JSON object is expected")
    architectures = content.get("architectures")
    names = [architectures] if isinstance(architectures, str) else architectures or []
    if not set(ARCHITECTURES).intersection(names):
        raise ConfigError(f"{where} is of {shown(architectures)}: a speculator is one of {', '.join(ARCHITECTURES)}")
    numbers = {name: _number(where, content, name) for name in ("n_predict", "vocab_size", "inner_dim", "emb_dim")}
    switches = {name: _switch(where, content, name) for name in ("tie_weights", "tie_lstm_embs", "scale_input")}
    method = content.get("method", "sum_rnn")
    if method not in _KINDS:
        raise ConfigError(f"{where} has method={shown(method)}: {' and '.join(_KINDS)} are handled")
    if "input_hidden_dim" in content:
        input_width = _number(where, content, "input_hidden_dim")
        dims = {"emb_dim": numbers["emb_dim"], "inner_dim": numbers["inner_dim"]}
        dims["proj_dim"] = _number(where, content, "proj_dim")
        if len(set(dims.values())) > 1:
            raise ConfigError(
                f"{where} has {', '.join(f'{name}={value}' for name, value in dims.items())}: only one width for all "
                "three is handled, since training weighs embeddings by emb_dim, and serving by inner_dim"
            )
    elif method == "sum_lstm":
        raise ConfigError(f"{where} has no input_hidden_dim, the width of the model's hidden states")
    else:
        input_width = numbers["emb_dim"]
    archs = content.get("base_model_archs") or ()
    kind = _KINDS[method]
    return SpeculatorConfig(
        kind=kind,
        n_predict=numbers["n_predict"],
        vocab_size=numbers["vocab_size"],
        input_width=input_width,
        width=numbers["inner_dim"],
        tie_weights=switches["tie_weights"],
        tie_gates=kind == "mlp" or switches["tie_lstm_embs"],
        scale_input=switches["scale_input"],
        base_architectures=(archs,) if isinstance(archs, str) else tuple(archs),
    )


def _number(where: str, content: Mapping[str, Any], name: str) -> int:
    """A number that may be written as text; inner_dim=0 means emb_dim."""
    value = content.get(name)
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)+", value):
        raise ConfigError(f"{where} has {name}={value!r}: layers of several stages are not handled")
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if name == "inner_dim" and value == 0:
        return _number(where, content, "emb_dim")
    return require_int(f"{name} in {where}", value, minimum=1, error=ConfigError)


def _switch(where: str, content: Mapping[str, Any], name: str) -> bool:
    value = content.get(name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{where} has {name}={shown(value)}: give true or false")
    return value


def _parts(config: SpeculatorConfig) -> dict[str, tuple[tuple[str, ...], int, tuple[int, ...]]]:
    """Parameter of the module -> names in a file, the dim along which they lie side by side, and the whole's shape."""
    width, found = config.width, dict[str, tuple[tuple[str, ...], int, tuple[int, ...]]]()
    is_lstm = config.kind == "lstm"
    for index in range(config.stages("emb")):
        gates = ("forget_",) if config.tie_gates else tuple(f"{gate}_" for gate in _GATES)
        names = tuple(f"{gate}emb.{index}.weight" for gate in (gates if is_lstm else ("",)))
        found[f"emb.{index}.weight"] = names, 1, (config.vocab_size, config.embedding_width)
    for index in range(config.stages("proj")):
        names = tuple(f"{gate}proj.{index}.weight" for gate in ([f"{one}_" for one in _GATES] if is_lstm else [""]))
        columns = width if index else config.input_width
        found[f"proj.{index}.weight"] = names, 0, (width * config.gates, columns)
    for norm in ("cell_ln", "state_ln") if is_lstm else ("ln",):
        for name in (f"{norm}.{index}.{part}" for index in range(config.stages(norm)) for part in ("weight", "bias")):
            found[name] = (name,), 0, (width,)
    for index in range(config.stages("head")):
        name = f"head.{index}.weight"
        found[name] = (name,), 0, (config.vocab_size, width)
    return found


def _copies(config: SpeculatorConfig) -> dict[str, str]:
    """Further names that a file may have for tied weights -> the name that is read."""
    found = dict[str, str]()
    is_lstm = config.kind == "lstm"
    for stem in ("head",) if is_lstm else ("emb", "proj", "ln", "head"):
        last = config.stages(stem) - 1
        for part in ("weight", "bias") if stem == "ln" else ("weight",):
            for index in range(last + 1, config.n_predict):
                found[f"{stem}.{index}.{part}"] = f"{stem}.{last}.{part}"
    if is_lstm and config.tie_gates:
        for index in range(config.stages("emb")):
            found |= {f"{gate}_emb.{index}.weight": f"forget_emb.{index}.weight" for gate in _GATES[1:]}
    return found


def weights(speculator: str | os.PathLike[str], config: SpeculatorConfig) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a speculator's module (heads.Speculator), one after the other, whole, on the CPU.

    Raises:
        ConfigError: weights are missing, have another shape, or are not known.
    """
    where, tensors = os.fspath(speculator), _tensors(speculator)
    parts = _parts(config)
    needed = {name for names, _, _ in parts.values() for name in names}
    missing, unknown = needed - set(tensors), set(tensors) - needed - set(_copies(config))
    if missing or unknown:
        what = f"no weight {min(missing)!r}" if missing else f"a weight {min(unknown)!r}, which is not known"
        raise ConfigError(f"the speculator {where} has {what}: its weights do not fit its config.json")
    for name, (names, dim, shape) in parts.items():
        found = [tensors[one]() for one in names]
        tensor = found[0] if len(found) == 1 else torch.cat(found, dim)
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"the speculator {where} has {' + '.join(names)} of shape {tuple(tensor.shape)}, and its config.json "
                f"says {shape}"
            )
        yield name, tensor


def _tensors(speculator: str | os.PathLike[str]) -> dict[str, Callable[[], Tensor]]:
    """The weights in a speculator's files by name, each of which is read when it is called for."""
    try:
        folder = model_folder(speculator, _FILES)
    except Exception as error:  # as in read_config()
        raise ConfigError(f"the weights of {os.fspath(speculator)} cannot be fetched ({error})") from error
    found = dict[str, Callable[[], Tensor]]()
    for path in sorted(folder.glob("*.safetensors")):
        from safetensors import safe_open

        file: Any = safe_open(path, "pt")
        found |= {name: partial(file.get_tensor, name) for name in list(file.keys())}
    if not found:
        for path in sorted(folder.glob("pytorch_model*.bin")):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found |= {name: partial(content.get, name) for name in content}
    if not found:
        raise ConfigError(f"{os.fspath(speculator)} holds no weights: *.safetensors or pytorch_model.bin")
    return {_SEQUENTIAL.sub(r"\1.\2.", name.removeprefix("speculator.")): read for name, read in found.items()}


def save(
    folder: Path, config: SpeculatorConfig, parameters: Mapping[str, Tensor], *, as_safetensors: bool = False
) -> None:
    """Write a speculator so that Arctic Inference, and we, read it.

    Args:
        folder: where to; it is made where it does not exist.
        config: what it is.
        parameters: of its module (heads.Speculator), by name.
        as_safetensors: write ``model.safetensors``, where tied weights lie once for each of their names, and not
            ``pytorch_model.bin``, where they lie once.
    """
    content: dict[str, Tensor] = {}
    for name, (names, dim, _) in _parts(config).items():
        chunks = parameters[name].detach().cpu().chunk(len(names), dim)
        content |= {one: chunk.contiguous() for one, chunk in zip(names, chunks, strict=True)}
    content |= {copy: content[name] for copy, name in _copies(config).items()}
    folder.mkdir(parents=True, exist_ok=True)
    new, other = ("model.safetensors", "pytorch_model.bin")[:: 1 if as_safetensors else -1]
    if as_safetensors:
        from safetensors.torch import save_file

        save_file({name: tensor.clone() for name, tensor in content.items()}, folder / new)
    else:
        torch.save(content, folder / new)
    (folder / other).unlink(missing_ok=True)  # an older speculator's, which might be read instead
    (folder / "config.json").write_text(json.dumps(_as_json(config, content), indent=1) + "\n")


def _as_json(config: SpeculatorConfig, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    common = {
        "model_type": "mlp_speculator",
        "n_predict": config.n_predict,
        "n_candidates": config.n_predict,
        "top_k_tokens_per_head": [1] * config.n_predict,
        "vocab_size": config.vocab_size,
        "tie_weights": config.tie_weights,
        "scale_input": config.scale_input,
        "base_model_archs": list(config.base_architectures),
        "torch_dtype": dtype,
    }
    if config.kind == "mlp":
        return {"architectures": [_MLP], "emb_dim": config.input_width, "inner_dim": config.width, **common}
    width = str(config.width)
    own = {"method": "sum_lstm", "input_hidden_dim": config.input_width, "tie_lstm_embs": config.tie_gates}
    return {"architectures": [_LSTM], **own, "inner_dim": width, "emb_dim": width, "proj_dim": width, **common}
