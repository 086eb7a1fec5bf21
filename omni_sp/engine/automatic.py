"""``parallel_config="auto"``: degrees for the devices that are there, chosen by the planner.

In a program that is already distributed rank 0 chooses, and the others take what it chose: two ranks that predict
differently would wait for each other in exchanges that never match.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from omni_sp.config import DiffusionParallelConfig
from omni_sp.engine.devices import shared_device
from omni_sp.engine.ranks.torchrun import inside_distributed_program, job_rank, job_size
from omni_sp.errors import ConfigError
from omni_sp.machine import memory_bytes, num_cores
from omni_sp.pipelines.load import ModelSource
from omni_sp.validation import shown

if TYPE_CHECKING:
    from omni_sp.planner import Machine, Plan

_AUTO = re.compile(r"auto(?::([1-9]\d{0,3}))?")
_FILES = ("model_index.json", "transformer/config.json", "vae/config.json")
"""What the planner reads of a repository on the hub, beside weights that are there already."""
_NVIDIA_SMI_S = 20.0
_LONGEST_REASON = 200
_CHOSEN = ("cfg_parallel_size", "ulysses_degree", "ring_degree", "shard_weights")


@dataclass(frozen=True)
class Devices:
    """What ranks can run on.

    Attributes:
        name: of one device, for people.
        count: how many ranks there may be.
        takes_all: whether there must be as many: they were asked for, or are there already.
        per_node: of the ranks, on one machine.
        machine: the planner's figures of one; None where it has none.
        note: why not.
        shares_memory: whether ``machine.memory_gb`` is of all ranks together.
        element_bytes: of a number in the dtype that the model is to have.
        when: `omni-sp doctor` measured the figures; "" where they are published ones.
    """

    name: str
    count: int
    takes_all: bool
    per_node: int
    machine: Machine | None = None
    note: str = ""
    shares_memory: bool = False
    element_bytes: int = 2
    when: str = ""

    def of_each(self, ranks: int) -> Machine:
        """The figures that each of so many ranks has.

        Raises:
            ConfigError: there are none.
        """
        if self.machine is None:
            raise ConfigError(self.note)
        return replace(self.machine, memory_gb=self.machine.memory_gb / ranks) if self.shares_memory else self.machine


@dataclass(frozen=True)
class Choice:
    """Degrees, and why these."""

    config: DiffusionParallelConfig
    why: str

    def __str__(self) -> str:
        sharded = ", weights sharded" if self.config.shard_weights else ""
        return f'parallel_config="auto": {self.config.equation}{sharded}, {self.why}'


def is_automatic(asked: Any) -> bool:
    """Whether degrees are to be chosen: "auto", or "auto:4" for exactly 4 ranks.

    Raises:
        ConfigError: another text.
    """
    if not isinstance(asked, str):
        return False
    if _AUTO.fullmatch(asked) is None:
        raise ConfigError(
            f'parallel_config={shown(asked)}: give a DiffusionParallelConfig, "auto", or "auto:4" for 4 ranks'
        )
    return True


def automatic_config(
    asked: str,
    source: ModelSource,
    *,
    device: str | None,
    dtype: str | None,
    offloads: bool = False,
    quantization: str | None = None,
    joins: bool = True,
    timeout_s: float = 600.0,
    request: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> DiffusionParallelConfig:
    """Choose degrees for a model on the devices that are there.

    Args:
        asked: "auto", or "auto:N" for N ranks.
        source: the model, of which configurations are read, and no weights.
        device: as for Omni.
        dtype: a torch dtype's name, or None for the device's default.
        offloads: whether weights wait in the host's memory; they are not sharded then.
        quantization: as for Omni: the transformer's weights take a byte each then.
        joins: in a distributed program, become one of its ranks, and take what rank 0 chooses. Without it, processes
            above rank 0 get degrees whose product is right: nobody looks at them.
        timeout_s: the longest wait for the other ranks, in seconds.
        request: what is drawn, as `omni_sp.planner.model_cost` names it; what is missing is the model's default.
        say: called with a line on what was chosen, and why, where it was chosen.

    Raises:
        ConfigError: the program around has another number of ranks than were asked for, or cannot be joined.
    """
    number = _AUTO.fullmatch(asked)
    assert number is not None, asked
    ranks = int(number[1]) if number[1] else None

    def choose(devices: Devices) -> DiffusionParallelConfig:
        choice = choose_degrees(source, devices, request, offloads=offloads, quantization=quantization)
        say(str(choice))
        return choice.config

    if not inside_distributed_program():
        return choose(devices_here(device, dtype, ranks))
    size = _program_size()
    if ranks not in (None, size):
        raise ConfigError(f'parallel_config="{asked}", but the program around has {size} ranks: give "auto"')
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    provisional = DiffusionParallelConfig(ulysses_degree=size)

    def choose_here() -> DiffusionParallelConfig:
        return choose(replace(devices_here(device, dtype, size), per_node=per_node))

    if joins:
        return _from_rank_0(choose_here, provisional, device, timeout_s)
    return choose_here() if job_rank() == 0 else provisional


def _program_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else job_size()


def _from_rank_0(
    choose: Callable[[], DiffusionParallelConfig],
    provisional: DiffusionParallelConfig,
    device: str | None,
    timeout_s: float,
) -> DiffusionParallelConfig:
    """What rank 0 chooses, on every rank of the program around."""
    from omni_sp.collectives import gather_ints
    from omni_sp.engine.ranks.torchrun import join
    from omni_sp.mesh import ParallelMesh

    join(provisional, device, timeout_s)
    mesh = ParallelMesh(provisional)
    own = choose() if mesh.rank == 0 else provisional
    cfg, ulysses, ring, shards = gather_ints([int(getattr(own, name)) for name in _CHOSEN], mesh.world)[0]
    return DiffusionParallelConfig(
        cfg_parallel_size=cfg, ulysses_degree=ulysses, ring_degree=ring, shard_weights=bool(shards)
    )


def choose_degrees(
    source: ModelSource,
    devices: Devices,
    request: Mapping[str, Any] | None = None,
    *,
    offloads: bool = False,
    quantization: str | None = None,
) -> Choice:
    """The planner's choice, or that of a simple rule where the planner has none. Nothing is raised.

    Args:
        source: the model.
        devices: what its ranks run on.
        request: as for automatic_config().
        offloads: as there.
        quantization: as there.
    """
    where = f"{devices.count} x {devices.name}"
    if devices.when:
        where += f" (as omni-sp doctor measured it, {devices.when})"
    if devices.count == 1:
        return Choice(DiffusionParallelConfig(), f"since there is one {devices.name}")
    location = source.single_file_config or source.location
    try:
        _fetch_configurations(location)
        config, why = _planned(location, devices, {**_size_of(source), **_given(request)}, offloads, quantization)
        return Choice(config, f"on {where}: {why}")
    except Exception as error:  # whatever a model's configuration does to the planner, there is the simple rule
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        config = simple_config(location, devices, _given(request).get("branches"))
        rule = "guidance first where there are branches, then Ulysses up to the heads, then ring"
        return Choice(config, f"on {where}, by a simple rule ({rule}); the planner does not help: {reason}")


def simple_config(location: str, devices: Devices, branches: int | None = None) -> DiffusionParallelConfig:
    """Guidance first where the pipeline has branches, then Ulysses up to the heads and within a node, then ring.

    Args:
        location: a folder or a hub id.
        devices: what the ranks run on.
        branches: forwards of one step; None for the default of the pipeline.
    """
    heads = None
    with suppress(Exception):  # nothing is known then
        from omni_sp.planner.folders import read_folder

        folder = read_folder(location)
        if folder is not None:
            heads, branches = folder.heads, folder.branches if branches is None else branches
    cfg = 2 if (branches or 1) > 1 and devices.count % 2 == 0 else 1
    sequence = devices.count // cfg
    most = min(heads or sequence, devices.per_node)
    ulysses = max(one for one in range(1, most + 1) if sequence % one == 0)
    return DiffusionParallelConfig(cfg_parallel_size=cfg, ulysses_degree=ulysses, ring_degree=sequence // ulysses)


def _planned(
    location: str, devices: Devices, size: Mapping[str, Any], offloads: bool, quantization: str | None
) -> tuple[DiffusionParallelConfig, str]:
    from omni_sp.planner import model_cost, plan
    from omni_sp.planner.report import best_in_words
    from omni_sp.planner.search import CONFIGURABLE

    devices.of_each(1)  # which there may not be, whatever the model
    cost, count = model_cost(location, **size), devices.count
    if quantization is not None:  # estimates count two bytes a weight, and float32 as half the memory
        cost = replace(cost, parameters=cost.parameters / devices.element_bytes)
    considered = CONFIGURABLE - {"vae_parallel", "data_parallel_size"}
    if offloads:
        considered = considered - {"shard_weights"} | {"offload"}
    while True:
        try:
            found = plan(cost, gpus=count, gpu=devices.of_each(count), consider=considered)
            break
        except ConfigError:  # it does not fit
            if not devices.shares_memory or devices.takes_all or count == 1:
                raise
            count //= 2
    found = _those_that_suit(found, devices if count == devices.count else replace(devices, per_node=count))
    chosen = {name: found.config_arguments[name] for name in _CHOSEN}
    return DiffusionParallelConfig(**chosen), best_in_words(found)


def _those_that_suit(found: Plan, devices: Devices) -> Plan:
    """The choices that take as many ranks as they must, and have each Ulysses group on one node."""
    choices = tuple(
        one
        for one in found.choices
        if (one.degrees.one_result == devices.count or not devices.takes_all)
        and devices.per_node % one.degrees.ulysses_degree == 0
    )
    if not choices:
        raise ConfigError(f"nothing that fits takes {devices.count} ranks")
    return replace(found, choices=choices)


def _given(request: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (request or {}).items() if value is not None}


def _size_of(source: ModelSource) -> dict[str, Any]:
    """What the model has as defaults of its own."""
    defaults = source.sampling_defaults
    names = {"height": "height", "width": "width", "num_frames": "num_frames", "num_inference_steps": "steps"}
    return {ours: defaults[name] for name, ours in names.items() if name in defaults}


def _fetch_configurations(location: str) -> None:
    """Have the small files of a repository on the hub in the cache, as far as they can be had."""
    if os.path.exists(location) or location.count("/") != 1:
        return
    from huggingface_hub import hf_hub_download

    with suppress(Exception):  # without a network: what the cache has is all there is
        for name in _FILES:
            hf_hub_download(location, name)


def devices_here(device: str | None = None, dtype: str | None = None, asked: int | None = None) -> Devices:
    """The devices of this machine.

    Args:
        device: as for Omni.
        dtype: a torch dtype's name, or None for the device's default.
        asked: for so many ranks; None for as many as there are.

    Raises:
        ConfigError: there is no such device.
    """
    from omni_sp.planner import machine

    one, num_gpus = shared_device(device)
    dtype = dtype or ("float32" if one == "cpu" else "bfloat16")
    element_bytes = 4 if dtype == "float32" else 2
    if one == "cpu":
        count = num_cores() if asked is None else asked
        on, when = _measured("cpu", dtype)
        on = _with_dtype(replace(on or machine("CPU"), memory_gb=memory_bytes() / 1e9), dtype)
        return Devices(
            "CPU core", count, asked is not None, count, on,
            shares_memory=True, element_bytes=element_bytes, when=when,
        )  # fmt: skip
    if one is not None:
        count = asked or 1
        return Devices(one, count, asked is not None, count, note=f"ranks that share {one} are for trying out")
    count = num_gpus if asked is None else asked
    name, gpu = _gpu()
    measured, when = _measured("cuda", dtype, name)
    if measured is not None:
        gpu = replace(measured, memory_gb=gpu.memory_gb) if gpu else measured
    return Devices(
        name, count, asked is not None, count, _with_dtype(gpu, dtype) if gpu else None,
        f"no figures of {name} are known", element_bytes=element_bytes, when=when,
    )  # fmt: skip


def _measured(device_type: str, dtype: str, name: str | None = None) -> tuple[Machine | None, str]:
    """What `omni-sp doctor` measured of such devices in this dtype, and when; None and "" where it measured others."""
    from omni_sp.planner.machines import measured_machine
    from omni_sp.planner.measured import load_measured

    found = load_measured(device_type)
    if found is None or found.dtype != dtype or name not in (None, found.device):
        return None, ""
    return measured_machine(found), found.when


def _with_dtype(on: Machine, dtype: str) -> Machine:
    """A machine as the planner sees it, which counts in bf16."""
    return replace(on, tflops=on.fp32_tflops, memory_gb=on.memory_gb / 2) if dtype == "float32" else on


def _gpu() -> tuple[str, Machine | None]:
    """The name of the first GPU, and its figures. The driver's tool is asked: torch would make a context on it."""
    from omni_sp.planner.machines import machine_of_device

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "GPU", None
    try:
        ask = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=True).stdout
        name, mebibytes = answer.splitlines()[0].rsplit(",", 1)
        return name.strip(), machine_of_device(name, memory_gb=float(mebibytes) * 2**20 / 1e9)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return "GPU", None
