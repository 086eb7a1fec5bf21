"""The messages between the front and the rank processes: small, frozen and picklable."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from omni_sp.config import DiffusionParallelConfig
from omni_sp.pipelines.capabilities import PipelineCapabilities
from omni_sp.pipelines.load import ModelSource
from omni_sp.pipelines.results import CallResult


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine is to run.

    Attributes:
        device: "cpu", "cuda", "cuda:N", or None for CUDA where there is one.
        dtype: a torch dtype's name, or None for the device's default.
        attention_backend: a kernel's name, or "auto".
        attention_strategy: whose sequence-parallel attention it is.
        replay: blocks that were followed once are replayed.
        compile: what is replayed is compiled; a text is a mode of torch.compile.
        cuda_graphs: forwards whose blocks are all replayed are captured.
        quantization: how transformers' weights are quantised while they are read, or None.
        offload: which parts of the pipeline wait on the CPU, "model" or "group", or None.
        vae_dtype: a torch dtype's name, or None for that of the others.
        rank_timeout_s: the longest silence of ranks during a call, in seconds.
        startup_timeout_s: the longest silence of ranks while they load, in seconds.
        lora: name -> where the LoRA adapter is.
    """

    source: ModelSource
    config: DiffusionParallelConfig
    device: str | None
    dtype: str | None
    attention_backend: str
    attention_strategy: str
    replay: bool
    compile: bool | str
    cuda_graphs: bool
    rank_timeout_s: float
    startup_timeout_s: float
    quantization: str | None = None
    offload: str | None = None
    vae_dtype: str | None = None
    lora: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RankPlacement:
    """Where a rank runs.

    Attributes:
        host: the name of the machine.
        device: the rank's own, such as "cuda:1".
        num_threads: for the CPU's kernels; 0 leaves torch's choice.
        parent_pid: the process on that machine whose death must end the rank; 0 where the rank cannot watch it.
        gpu: what tells its GPU from others there, such as "cuda:5", where ``device`` is counted among those that the
            rank may see; "" where ``device`` says it.
    """

    host: str
    device: str
    num_threads: int
    parent_pid: int
    gpu: str = ""


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """Front -> rank, the first message: who the rank is.

    Attributes:
        backend: what moves tensors, in torch.distributed's words.
        store: the host and port at which the front's store listens.
    """

    rank: int
    options: EngineOptions
    placement: RankPlacement
    backend: str
    store: tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Join:
    """Front -> ranks: all have loaded their pipeline; form the process group, where nobody waits for a slow loader."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """Front -> ranks: one call of the pipeline.

    Attributes:
        arguments: of the pipeline's own ``__call__``, without the generator.
        seeds: one; or one for each prompt where the arguments hold lists of prompts (see batching.merge_calls); or one
            for each output of the one prompt.
        scheduler: takes the loaded one's place, see OmniDiffusionSamplingParams.
        adapters: the LoRA adapters that are on, (name, scale).
        check: "ranks" also runs it on each rank alone, "batch" also runs each prompt alone; both answer how far apart
            the results are.
        can_be_aborted: before every step the ranks agree whether an Abort has come.
        previews: send small pictures of the intermediate result along with some of the steps.
    """

    request_id: str
    arguments: Mapping[str, Any]
    seeds: tuple[int, ...]
    scheduler: str | tuple[str, Mapping[str, Any]] | None = None
    adapters: tuple[tuple[str, float], ...] = ()
    check: Literal["ranks", "batch"] | None = None
    can_be_aborted: bool = False
    previews: bool = False


@dataclass(frozen=True, kw_only=True)
class Abort:
    """Front -> ranks: leave the call of this name before its next step. For a call that is over it means nothing."""

    request_id: str


@dataclass(frozen=True, kw_only=True)
class Ping:
    """Front -> ranks: give a sign of life, also in the middle of a call."""


@dataclass(frozen=True, kw_only=True)
class Alive:
    """Rank -> front: the answer to Ping. Its process runs, whatever its call waits for."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Front -> ranks: leave."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Rank -> front: the libraries are imported, and this is what is being read.

    Attributes:
        part: the name of the component; "" before the first.
        done: components that were read before it.
        total: components in all.
    """

    part: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Rank -> front: the pipeline is in memory."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Rank -> front: waiting for calls.

    Attributes:
        ranks: how many there are.
        layout: which rank is where, for people.
        capabilities: what the pipeline can be asked for.
        device: this rank's.
        dtype: of the weights.
        load_s: seconds to load and parallelize.
        rings: the ranks, a row for each Ulysses group; the ring goes from row to row.
        start_s: seconds of each part of the start so far, by the front's clock (see startup.CAPTIONS).
        model: its name for people, without the folders that it lies in.
    """

    rank: int
    ranks: int
    layout: str
    capabilities: PipelineCapabilities
    device: str
    dtype: str
    load_s: float
    rings: tuple[tuple[int, ...], ...] = ((0,),)
    start_s: Mapping[str, float] = field(default_factory=dict)
    model: str = ""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Rank 0 -> front: denoising steps so far, and in all.

    Attributes:
        previews: small pictures of the intermediate result, one for each picture of the call, prompt by prompt.
        note: what takes long just now, such as a compilation.
    """

    done: int
    total: int
    previews: tuple[Any, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Done:
    """Rank -> front: the call is over.

    Attributes:
        result: what the pipeline made; from rank 0 alone, and None of a check.
        tokens: stream name -> the most tokens that one forward had.
        errors: of a check, from every rank: stage -> relative difference.
        gathers: of a check: operation -> how often it needed a full tensor.
        blocks: how the calls of blocks were made, see `omni_sp.sharding.BlockCounts`.
        kernels: shape of attention -> the kernel that was timed to be the fastest, with attention_backend="tune".
        vae_ranks: ranks that decoded together, or 1.
        encoder_ranks: encoder -> the ranks that ran it for all, or all ranks; empty with one rank.
        branches: with ``cfg_parallel_size`` above 1, what its groups shared, see `omni_sp.pipelines.branches`.
        exchanges: of what the rank has sent so far (see ParallelMesh.exchanges_so_far).
    """

    request_id: str
    result: CallResult | None
    tokens: Mapping[str, int]
    errors: Mapping[str, float] = field(default_factory=dict)
    gathers: Mapping[str, int] = field(default_factory=dict)
    blocks: Mapping[str, Any] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)
    vae_ranks: int = 1
    encoder_ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    branches: Mapping[str, Any] = field(default_factory=dict)
    exchanges: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Rank -> front: it raised.

    Attributes:
        kind: the class of the error.
        is_shared: where one rank raises it, all do: one of our own InvalidInputErrors, or an abort.
        is_peer_loss: the error follows from another rank's end (a broken connection), and has no cause of its own.
        is_out_of_memory: it was raised for want of memory.
        is_device_error: the device is in error, and what runs on it next would fail too.
        param: of a SamplingParamsError.
        place: the file and line that raised it.
        follows: it tells of another rank's error, which that rank reports itself.
        kernels: shape of attention -> the kernel that was timed to be the fastest, with attention_backend="tune".
        exchanges: of what the rank has sent so far (see ParallelMesh.exchanges_so_far).
    """

    kind: str
    message: str
    traceback: str
    is_shared: bool
    is_peer_loss: bool
    is_out_of_memory: bool = False
    is_device_error: bool = False
    param: str | None = None
    place: str = ""
    follows: bool = False
    exchanges: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class RankExited:
    """What the front notes when a rank's process has ended; ``exitcode`` is negative for a signal, None if unknown."""

    exitcode: int | None


OnProgress = Callable[[Progress], None]


def new_seed() -> int:
    """A seed at random, for a call whose user names none."""
    return secrets.randbelow(2**31)
