"""Several ranks on one CPU: the variables that vLLM needs are set, and the user's own stay."""

from __future__ import annotations

import os

import pytest

from omni_sp.llm.vllm import cpu_env

GIB = 2**30


def test_ranks_share_cores_and_a_quarter_of_the_free_memory() -> None:
    assert cpu_env.defaults(2, 8, 32 * GIB, {}) == {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "4",
        "VLLM_CPU_KVCACHE_SPACE": "4",
    }
    assert cpu_env.defaults(4, 2, GIB, {}) == {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cpu_env, "_numa_nodes", lambda: 1)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3|4-7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    cpu_env.set_defaults(2, memory_is_set=True)
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ
    assert capsys.readouterr().err == ""
    cpu_env.set_defaults(2, memory_is_set=False)
    assert int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) >= 1
    assert os.environ["OMP_NUM_THREADS"] == "3"
    printed = capsys.readouterr().err
    assert "2 ranks" in printed
    assert "VLLM_CPU_KVCACHE_SPACE=" in printed


def test_a_node_for_every_rank_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_env, "_numa_nodes", lambda: 2)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    cpu_env.set_defaults(2, memory_is_set=False)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in os.environ
