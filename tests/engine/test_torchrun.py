"""The job that the environment tells of: one that is there is joined, and one that is not is named."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

import omni_sp.engine.ranks.torchrun as torchrun
from omni_sp import AsyncOmni, ConfigError, DiffusionParallelConfig, Omni
from omni_sp.engine.ranks.fork import ForkLauncher
from omni_sp.pipelines.shapes import SHAPES_MODEL

TWO = DiffusionParallelConfig(ulysses_degree=2)
WAY_OUT = "if there is no such job, `unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT`"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without a job, to be changed by ``tell``."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return monkeypatch


@pytest.fixture
def stranger() -> Iterator[int]:
    """A port that another program listens on, which says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def tell(environment: pytest.MonkeyPatch, rank: str, size: str, port: int = 29500) -> str:
    """Set the variables of a job; how they are shown."""
    values = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in values.items():
        environment.setenv(name, value)
    return ", ".join(f"{name}={value}" for name, value in values.items())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_job_of_one_is_none(environment: pytest.MonkeyPatch, stranger: int) -> None:
    assert not torchrun.inside_distributed_program()
    environment.setenv("MASTER_PORT", "29500")
    assert not torchrun.inside_distributed_program()
    tell(environment, "0", "1", stranger)
    environment.setenv("LOCAL_RANK", "0")
    assert not torchrun.inside_distributed_program()
    with Omni(SHAPES_MODEL, device="cpu") as omni:
        assert omni.info.ranks == 1
    omni_of_two = AsyncOmni(SHAPES_MODEL, TWO, device="cpu")
    assert omni_of_two.is_main
    assert isinstance(omni_of_two._dispatcher.replicas[0].launcher, ForkLauncher)
    tell(environment, "0", "2", stranger)
    assert torchrun.inside_distributed_program()


@pytest.mark.parametrize("kind", [Omni, AsyncOmni])
def test_a_job_of_another_size_is_named_at_once(environment: pytest.MonkeyPatch, kind: type, stranger: int) -> None:
    told = tell(environment, "0", "4", stranger)
    with pytest.raises(ConfigError) as caught:
        kind(SHAPES_MODEL, TWO, device="cpu")
    assert str(caught.value) == (
        f"{TWO.equation}, but {told} in the environment say that this is one process of a job of 4: give degrees whose "
        f"product is 4; {WAY_OUT}"
    )
    environment.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(ConfigError, match="but torchrun started 4 processes: the product of the degrees must be"):
        kind(SHAPES_MODEL, TWO, device="cpu")


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("0", "two"), ("", "2"), ("0", "0")])
def test_what_is_no_rank_is_named(environment: pytest.MonkeyPatch, rank: str, size: str) -> None:
    told = tell(environment, rank, size)
    with pytest.raises(ConfigError) as caught:
        Omni(SHAPES_MODEL, TWO, device="cpu")
    assert str(caught.value) == f"{told} in the environment is no rank of a job: set them right; {WAY_OUT}"


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("is_taken", [False, True])
def test_a_job_that_is_not_there_is_waited_for_with_a_bound_and_a_word(
    environment: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], stranger: int, rank: str, is_taken: bool
) -> None:
    environment.setattr(torchrun, "_PEERS_S", 1.0)
    environment.setattr(torchrun, "_NOTICE_S", 0.0)
    told = tell(environment, rank, "2", stranger if is_taken else free_port())
    with pytest.raises(ConfigError) as caught:
        Omni(SHAPES_MODEL, TWO, device="cpu")
    assert str(caught.value).startswith(f"the other processes of the job of {told} were not found in 1 s (")
    assert str(caught.value).endswith(WAY_OUT)
    assert "\n" not in str(caught.value)
    waiting = f"omni-sp: waiting up to 1 s for the other processes of the job of {told}; {WAY_OUT}"
    assert waiting in capfd.readouterr().err or (is_taken and rank == "0")  # a taken port is known at once


def test_processes_that_a_hand_started_meet(environment: pytest.MonkeyPatch) -> None:
    tell(environment, "0", "2", free_port())
    stores = []

    def meet() -> None:
        import torch.distributed as dist

        port = int(os.environ["MASTER_PORT"])
        stores.append(dist.TCPStore("127.0.0.1", port, 2, is_master=False))  # type: ignore[attr-defined]

    other = threading.Thread(target=meet)
    other.start()
    stores.append(torchrun.rendezvous(60.0))
    other.join(60)
    stores[0].set("word", "yes")
    assert stores[1].get("word") == b"yes"
