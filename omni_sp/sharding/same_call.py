"""Whether the ranks call a transformer with the same inputs and the same weights, before its forward.

Ranks that draw other noise, encode another prompt or load a LoRA alone would compute a mixture of several pictures, and
nothing would say so. So the first forwards of a call, and every fourth one after that, begin with two exchanges of
a few hundred bytes. Random numbers drawn between the steps, by a scheduler or a callback, are found at the second one.

A hook, or a component that was replaced, on one rank alone would have that rank enter other exchanges than the rest,
and all would wait until the process group's timeout. Where a message between the ranks costs some microseconds, every
forward begins by comparing that; elsewhere the forwards do that begin with exchanges anyway.

Numbers are compared by random projections, which find a tensor whose relative difference is 1 % (a fifth, in 16 bit),
and forgive what ranks with other kernels or devices round otherwise. Integers and masks are compared exactly.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import torch

from omni_sp.collectives import gather_ints, gather_texts
from omni_sp.errors import ShardingError
from omni_sp.mesh import Axis
from omni_sp.sharding.replay import block_lists

_EVERY = 4
_EVERY_FOR_WEIGHTS = 16
_PROJECTIONS = 4
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_TOLERANCE_16_BIT = 2e-2
_SAMPLES = 16  # elements of each weight
_CHUNK = 2**20  # integers that are widened at once
_SHOWN = 80  # characters of a value in a message
_FOREIGN = "hooks or code of others in"

CallToken = Callable[[], object]
"""Gives an object that is another one in every call of the pipeline, on all ranks alike."""
Surroundings = Callable[[], Mapping[str, str]]
"""Describes what else of the pipeline decides on exchanges, by name; quick, since every forward begins with it."""


class SameCallCheck:
    """Compares what the ranks are about to compute, at some of the forwards of one transformer.

    Args:
        model: the transformer.
        axis: the ranks that share its tokens.
        always: look at every forward.
        call_token: tells where a call of the pipeline begins; None where only the transformer is known.
        surroundings: describes the pipeline around it; None where only the transformer is known.
        with_blocks: compare the numbers of its blocks' weights. Groups of ranks that shard these hold others whole at a
            time: what somebody read is whole until the next forward, and a group makes no forward that another makes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        axis: Axis,
        *,
        always: bool,
        call_token: CallToken | None,
        surroundings: Surroundings | None,
        with_blocks: bool = True,
    ) -> None:
        self._model, self._axis, self._always = model, axis, always
        self._call_token = call_token or (lambda: None)
        self._surroundings = surroundings or dict
        self._token: object = None
        self._num_forwards = self._num_changes = 0
        self._weights = ModelText(model, with_blocks=with_blocks)

    def before_forward(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], foreign: Sequence[str] | None, num_changes: int = 0
    ) -> None:
        """Compare the ranks, where it is this forward's turn; all of them count alike.

        Args:
            args: of the forward.
            kwargs: of the forward.
            foreign: paths of the modules that other people's code runs in; None to compare inputs alone, of a model
                whose modules may hold what one rank ran before.
            num_changes: how often this rank has found the modules changed so far, which need not be as often as others
                have: where any rank has found more, all compare the modules.

        Raises:
            ShardingError: the ranks differ; it names the input or the module, and the ranks.
        """
        if self._axis.size == 1 or "fake" in self._axis.backends.values():
            return
        token = self._call_token()
        if token is not self._token:
            self._token, self._num_forwards = token, 0
        self._num_forwards += 1
        number = self._num_forwards
        looks = self._always or number <= _EVERY or number % _EVERY == 0
        if not looks and self._axis.channel is None:  # all ranks have one, or none
            return
        inputs = dict(_named_inputs(self._model, args, kwargs)) if looks else {}
        described = {path: _describe(value) for path, value in inputs.items()}
        around = {} if foreign is None else {**self._surroundings(), _FOREIGN: ", ".join(foreign) or "no module"}
        has_changed = foreign is not None and num_changes != self._num_changes
        own = [_checksum(around), int(has_changed), _checksum(described)]
        held = list(zip(*gather_ints(own, self._axis), strict=True))
        is_turn = looks and (self._always or number == 1 or number % _EVERY_FOR_WEIGHTS == 0)
        if len({*held[0]}) > 1 or any(held[1]) or (is_turn and foreign is not None):
            message = f"the ranks hold different versions of {type(self._model).__name__}"
            self._num_changes = num_changes
            _require_same_texts(self._axis, message, {**around, **self._weights.describe()})
        if len({*held[2]}) > 1:
            _raise_different(
                self._axis, f"the ranks call {type(self._model).__name__} with different inputs", described
            )
        if looks:
            self._compare_numbers(inputs)

    def _compare_numbers(self, inputs: Mapping[str, Any]) -> None:
        name = type(self._model).__name__
        tensors = {path: value for path, value in inputs.items() if _can_be_compared(value)}
        if differing := _differing(tensors, self._axis):
            shown = "; ".join(f"{path} on ranks {ranks}" for path, ranks in differing.items())
            raise ShardingError(
                f"the ranks call {name} with different numbers than rank {self._axis.ranks[0]}: {shown[:1000]}. Every "
                f"rank must run the same call on the same inputs{self._advice(differing, inputs)}"
            )

    def _advice(self, differing: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
        first, *_ = inputs
        if {_parameter(path) for path in differing} != {_parameter(first)}:
            return ""
        if self._num_forwards == 1:
            return (
                ". Only the initial noise differs: give every rank a generator of the same seed, "
                "generator=torch.Generator('cpu').manual_seed(0)"
            )
        return (
            ". They were the same when the call began, so the scheduler or a callback drew random numbers between the "
            "steps: call torch.manual_seed(0) on every rank before the pipeline"
        )


class ModelText:
    """Describes the modules and weights of a model by one line for each module.

    Args:
        model: the model.
        with_blocks: as of `SameCallCheck`.
    """

    def __init__(self, model: torch.nn.Module, *, with_blocks: bool = True) -> None:
        self._model, self._with_blocks = model, with_blocks
        self._versions: tuple[tuple[Any, ...], ...] = ()
        self._samples = 0

    def describe(self) -> dict[str, str]:
        """Path of a module, or of an attribute of it -> what it is; the weights are one line."""
        lines = {}
        for path, module in self._model.named_modules():
            shown = path or "the transformer"
            lines[shown] = type(module).__name__
            lines |= {f"{shown}.{name}": value for name, value in _settings(module).items()}
        return {**lines, "weights": self.checksum()}

    def checksum(self) -> str:
        """Of a few elements of each weight, read again where a weight was replaced or changed."""
        # Buffers that are not saved with a model are caches, and may depend on what was run before.
        buffers = (
            buffer
            for module in self._model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        )
        left_out = set()
        if not self._with_blocks:
            left_out = {id(x) for block in block_lists(self._model) for x in (*block.parameters(), *block.buffers())}
        weights = [x for x in (*self._model.parameters(), *buffers) if _is_plain(x) and id(x) not in left_out]
        versions = tuple((id(weight), weight.dtype, _version(weight)) for weight in weights)
        if versions != self._versions:
            samples = [_sample(weight.detach()) for weight in weights]
            shapes = repr([(weight.shape, weight.dtype) for weight in weights])
            content = torch.cat(samples).cpu().numpy().tobytes() if samples else b""
            self._versions, self._samples = versions, zlib.crc32(content, zlib.crc32(shapes.encode()))
        return f"checksum {self._samples:08x}"


def _checksum(texts: Mapping[str, str]) -> int:
    return zlib.crc32(repr(texts).encode())


def _require_same_texts(axis: Axis, message: str, texts: Mapping[str, str]) -> None:
    """Raise where the ranks describe something in different words; the error shows the first that differ."""
    if len(set(gather_ints([_checksum(texts)], axis))) > 1:
        _raise_different(axis, message, texts)


def _raise_different(axis: Axis, message: str, texts: Mapping[str, str]) -> NoReturn:
    lines = [dict(_lines(text)) for text in gather_texts("\n".join(map("\t".join, texts.items())), axis)]
    paths = [path for of_rank in lines for path in of_rank]
    path = next(path for path in paths if len({of_rank.get(path) for of_rank in lines}) > 1)
    held = ", ".join(
        f"rank {rank}: {of_rank.get(path, 'nothing')}" for rank, of_rank in zip(axis.ranks, lines, strict=True)
    )
    raise ShardingError(f"{message}: {path}: {held}. Every rank must run the same program on the same inputs")


def _lines(text: str) -> Iterator[tuple[str, str]]:
    for line in text.split("\n"):
        path, _, value = line.partition("\t")
        yield path, value


def _named_inputs(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each tensor and each plain value of a call, with the name of its parameter and its place in it."""
    names = [*list(inspect.signature(type(model).forward).parameters)[1:], *map("argument {}".format, range(len(args)))]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in [*filter(given.__contains__, names), *sorted(given.keys() - {*names})]:
        yield from _leaves(name, given[name])


def _parameter(path: str) -> str:
    return path.partition("[")[0]


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(f"{path}[{index}]", item)
    elif isinstance(value, dict):
        for key, item in sorted(value.items(), key=lambda pair: str(pair[0])):
            yield from _leaves(f"{path}[{key!r}]", item)
    else:
        yield path, value


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    plain = value is None or isinstance(value, (bool, int, float, str))
    return repr(value)[:_SHOWN].replace("\n", " ") if plain else type(value).__qualname__


def _settings(module: torch.nn.Module) -> dict[str, str]:
    """The plain attributes of a module and its processor, and PEFT's: which adapters are active, and how strongly."""
    processor = vars(module).get("processor")
    owners = [module] if processor is None or not hasattr(processor, "__dict__") else [module, processor]
    settings = {name: repr(x) for owner in owners for name, x in vars(owner).items() if _is_setting(x)}
    if isinstance(vars(module).get("scaling"), dict):
        state = [getattr(module, name, None) for name in ("active_adapters", "disable_adapters", "merged_adapters")]
        settings["adapters"] = f"{vars(module)['scaling']} {state}"
    return settings


def _is_setting(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(x, (bool, int, float, str)) for x in value)
    return isinstance(value, (bool, int, float))


def _is_plain(value: torch.Tensor) -> bool:
    """True for a tensor whose elements can be read here; a subclass may hold them elsewhere, or otherwise."""
    kinds = (torch.Tensor, torch.nn.Parameter)
    return type(value) in kinds and not value.is_meta and value.layout == torch.strided and value.numel() > 0


def _can_be_compared(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and _is_plain(value)


def _version(weight: torch.Tensor) -> object:
    """What is another one when somebody has written to a weight. Of one made in inference mode nobody knows."""
    return object() if weight.is_inference() else weight._version


def _sample(weight: torch.Tensor) -> torch.Tensor:
    numbers = torch.view_as_real(weight.resolve_conj()) if weight.is_complex() else weight
    flat = numbers.reshape(-1) if numbers.is_contiguous() else numbers.flatten()
    return flat[:: max(1, flat.numel() // _SAMPLES)].double()


def _differing(tensors: Mapping[str, torch.Tensor], axis: Axis) -> dict[str, list[int]]:
    """The tensors whose numbers differ from the first rank's, and on which ranks."""
    if not tensors:
        return {}
    with torch.no_grad():
        own = torch.stack([_projections(tensor.detach()).cpu() for tensor in tensors.values()])
    width = own.shape[1]
    per_rank = [torch.tensor(values).view(-1, width) for values in gather_ints(own.view(-1).tolist(), axis)]
    differing: dict[str, list[int]] = {}
    for row, (path, tensor) in enumerate(tensors.items()):
        first = per_rank[0][row]
        for rank, values in zip(axis.ranks, per_rank, strict=True):
            if not _are_alike(values[row], first, tensor.dtype):
                differing.setdefault(path, []).append(rank)
    return differing


def _are_alike(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    if torch.equal(one, other):
        return True
    if not (dtype.is_floating_point or dtype.is_complex):
        return False
    a, b = (words.view(torch.float64).nan_to_num() for words in (one, other))
    return bool(((a - b).abs() <= _TOLERANCE.get(dtype, _TOLERANCE_16_BIT) * torch.maximum(a[-1], b[-1])).all())


def _projections(tensor: torch.Tensor) -> torch.Tensor:
    """Random projections of a tensor and its norm as 64-bit words; of integers, sums with random factors."""
    numbers = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    rows = numbers.reshape(-1, numbers.shape[-1]) if numbers.ndim else numbers.reshape(1, 1)
    if not numbers.is_floating_point():
        across, along = (_factors(size, level).to(tensor.device) for level, size in enumerate(rows.shape))
        sums = torch.cat([(some.long() * along[:, 0]).sum(1) for some in rows.split(max(1, _CHUNK // rows.shape[1]))])
        words = (sums.unsqueeze(-1) * across).sum(0)
        return torch.cat([words, words.new_zeros(1)])
    rows = rows.float()
    across, along = (_directions(size, level).to(tensor.device) for level, size in enumerate(rows.shape))
    projected = ((rows @ along) * across).sum(0)
    return torch.cat([projected, torch.linalg.vector_norm(rows).reshape(1)]).double().view(torch.int64)


@lru_cache(maxsize=64)
def _directions(size: int, level: int) -> torch.Tensor:
    return torch.randn(size, _PROJECTIONS, generator=torch.Generator().manual_seed(level))


@lru_cache(maxsize=64)
def _factors(size: int, level: int) -> torch.Tensor:
    return torch.randint(1, 2**31, (size, _PROJECTIONS), generator=torch.Generator().manual_seed(level))
