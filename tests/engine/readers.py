"""Ranks whose loading is watched, or follows a script. Each function is what a rank runs on its end of the pipe."""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from omni_sp.engine.messages import Call, Failed, Join, Loaded, Loading, RankSettings, Ready, Stop
from omni_sp.engine.worker import die_with_parent, rank_main
from omni_sp.pipelines.capabilities import PipelineCapabilities

FOREVER_S = 600.0
BEGUN = Path("rank-0-has-begun")


@dataclass(frozen=True)
class Read:
    """What a rank had read and held when its last call was over.

    Attributes:
        parts: of the pipeline, whose files it opened. num_bytes: of these files. num_parameters: in its memory;
            of_vae: the VAE's, wherever they are.
    """

    parts: list[str]
    num_bytes: int
    num_parameters: int
    of_vae: int

    @classmethod
    def by(cls, rank: int) -> Read:
        """As this rank has noted it in the current folder."""
        return cls(**json.loads(Path(f"rank-{rank}.json").read_text()))


def watched(front: Connection) -> None:
    """A rank as it is; it notes what it has read."""
    import safetensors

    files: set[Path] = set()
    original = safetensors.safe_open

    def noted(filename: Any, *args: Any, **kwargs: Any) -> Any:
        files.add(Path(filename))
        return original(filename, *args, **kwargs)

    for module in [*sys.modules.values()]:
        if vars(module).get("safe_open") is original:
            module.safe_open = noted  # type: ignore[attr-defined]

    from omni_sp.engine.pipeline_runner import PipelineRunner

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def called(runner: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(runner, *args, **kwargs)
            _note(runner, files)
            return result

        return called

    PipelineRunner.run, PipelineRunner.check = noting(PipelineRunner.run), noting(PipelineRunner.check)  # type: ignore[method-assign]
    rank_main(front)


def reads_two_parts(front: Connection) -> None:
    """Rank 1 says its first word when rank 0 has loaded everything."""
    rank = _rank(front)
    if rank == 1:
        _wait_for_rank_0()
    for part, done in [("", 0), ("the body", 0), ("the mind", 1)]:
        _tell(front, Loading(part=part, done=done, total=2))
    _tell(front, Loaded())
    BEGUN.touch()
    assert isinstance(_receive(front), Join)
    capabilities = PipelineCapabilities(name="ScriptedPipeline", parameters={"prompt": None}, takes_anything=True)
    _tell(
        front,
        Ready(
            rank=rank, ranks=2, layout="scripted", capabilities=capabilities, device="cpu", dtype="float32", load_s=0.0
        ),
    )
    while not isinstance(message := _receive(front), Stop):
        assert isinstance(message, Call)
        _tell(front, _failed("SamplingParamsError", "not this", is_shared=True))


def raises_while_reading(front: Connection) -> None:
    """Rank 1 raises when both have begun to read."""
    if _begins_to_read(front) == 1:
        _tell(front, _failed("KeyError", "the body"))
    time.sleep(FOREVER_S)


def dies_while_reading(front: Connection) -> None:
    """Rank 1 ends when both have begun to read."""
    if _begins_to_read(front) == 1:
        sys.exit(3)
    time.sleep(FOREVER_S)


def misses_a_file_on_rank_0(front: Connection) -> None:
    """Rank 0 finds no file for a part that rank 1 does not need."""
    rank = _begins_to_read(front)
    _tell(front, Loaded() if rank == 1 else _failed("ModelNotFoundError", "no such file", is_shared=True))
    time.sleep(FOREVER_S)


def _note(runner: Any, files: set[Path]) -> None:
    import torch

    modules = {name: part for name, part in runner._pipe.components.items() if isinstance(part, torch.nn.Module)}
    counts = {
        name: sum(parameter.numel() for parameter in module.parameters() if not parameter.is_meta)
        for name, module in modules.items()
    }
    note = Read(
        parts=sorted({file.parent.name for file in files}),
        num_bytes=sum(file.stat().st_size for file in files),
        num_parameters=sum(counts.values()),
        of_vae=sum(parameter.numel() for parameter in modules["vae"].parameters()),
    )
    Path(f"rank-{runner._handle.mesh.rank}.json").write_text(json.dumps(asdict(note)))


def _begins_to_read(front: Connection) -> int:
    """Rank 1 after rank 0."""
    rank = _rank(front)
    if rank == 1:
        _wait_for_rank_0()
    _tell(front, Loading(part="the body", done=0, total=2))
    BEGUN.touch()
    return rank


def _wait_for_rank_0() -> None:
    until = time.monotonic() + 60.0
    while not BEGUN.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def _rank(front: Connection) -> int:
    settings = _receive(front)
    assert isinstance(settings, RankSettings)
    die_with_parent(settings.placement.parent_pid)
    return settings.rank


def _failed(kind: str, message: str, *, is_shared: bool = False) -> Failed:
    return Failed(kind=kind, message=message, traceback=f"Traceback of {kind}", is_shared=is_shared, is_peer_loss=False)


def _tell(front: Connection, message: Any) -> None:
    front.send_bytes(pickle.dumps(message))


def _receive(front: Connection) -> Any:
    return pickle.loads(front.recv_bytes())
