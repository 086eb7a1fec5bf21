"""Our flags on vLLM's command line become vLLM's own, and invalid ones are refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from omni_sp.errors import ConfigError, UnsupportedModelError
from omni_sp.llm.speculation.settings import SpeculationSettings
from omni_sp.llm.vllm.cli_flags import for_vllm
from omni_sp.llm.vllm.config import LlmParallelConfig
from omni_sp.llm.vllm.step_metrics import StepCounter, StepCounts, start_step_counter


@pytest.fixture(autouse=True)
def _a_model_named_m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "M").mkdir()
    (tmp_path / "M" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')


def settings_in(arguments: list[str]) -> dict[str, object]:
    entry: dict[str, object] = json.loads(arguments[arguments.index("--additional-config") + 1])["omni_sp"]
    return entry


def test_without_our_flags_nothing_changes() -> None:
    for line in ("serve M --tensor-parallel-size 2", "serve M -tp=2 --additional-config {}", "bench latency", ""):
        assert for_vllm(line.split()) == line.split()


@pytest.mark.parametrize(
    ("line", "ranks", "sequence", "tensor", "shift", "threshold"),
    [
        ("serve M --ulysses-sequence-parallel-size 2", 2, 2, 1, False, None),
        ("serve M --tensor-parallel-size 4 --sequence-parallel-size 2", 8, 2, 4, False, None),
        ("--model M -tp 2 --sequence_parallel_size=3 --enable_shift_parallel", 6, 3, 2, True, None),
        ("serve M --sequence-parallel-size 2 --enable-shift-parallel --shift-parallel-threshold 64", 2, 2, 1, True, 64),
    ],
)
def test_our_flags_become_vllms(
    line: str, ranks: int, sequence: int, tensor: int, shift: bool, threshold: int | None
) -> None:
    rewritten = for_vllm(line.split())
    assert rewritten[rewritten.index("--tensor-parallel-size") + 1] == str(ranks)
    assert rewritten.count("--tensor-parallel-size") == 1
    assert "-tp" not in rewritten
    assert rewritten.count("--enforce-eager") == 1
    assert not any("shift" in word or "sequence" in word for word in rewritten if word.startswith("--"))
    settings = LlmParallelConfig.from_additional_config({"omni_sp": settings_in(rewritten)})
    assert settings == LlmParallelConfig(sequence, tensor, shift, threshold)
    assert settings.world_size == ranks
    assert for_vllm(rewritten) == rewritten  # a child process reads the line again


def test_a_degree_of_one_is_vllms_own_tensor_parallelism() -> None:
    stock = ["serve", "M", "--tensor-parallel-size", "2"]
    assert for_vllm(["serve", "M", "--sequence-parallel-size", "1", "-tp", "2"]) == stock
    assert LlmParallelConfig.from_additional_config({"omni_sp": {"sequence_parallel_size": 1}}) is None
    assert LlmParallelConfig.from_additional_config({}) is None


def test_the_users_own_additional_config_stays() -> None:
    rewritten = for_vllm(["serve", "M", "--sequence-parallel-size", "2", "--additional-config", '{"mine": 1}'])
    assert json.loads(rewritten[rewritten.index("--additional-config") + 1])["mine"] == 1
    assert rewritten.count("--additional-config") == 1
    with pytest.raises(ConfigError, match="additional_config is a list, and ours is added: give a dict"):
        LlmParallelConfig(sequence_parallel_size=2).additional_config([1])  # type: ignore[arg-type]


@pytest.mark.parametrize("sharded", [False, True])
def test_suffix_decoding_becomes_vllms_custom_class_on_one_rank_and_on_several(sharded: bool) -> None:
    line = ["serve", "M", "-sc", '{"method":"suffix","num_speculative_tokens":8,"suffix_max_spec_offset":1}']
    rewritten = for_vllm(line + ["--sequence-parallel-size", "2"] * sharded)
    assert json.loads(rewritten[rewritten.index("--speculative-config") + 1]) == {
        "method": "custom_class",
        "model": "omni_sp.llm.speculation.proposer.Proposer",
        "num_speculative_tokens": 8,
    }
    assert "-sc" not in rewritten
    assert rewritten[rewritten.index("--worker-cls") + 1] == "omni_sp.llm.speculation.worker.Worker"
    assert ("--enforce-eager" in rewritten) == sharded
    settings = LlmParallelConfig.from_additional_config({"omni_sp": settings_in(rewritten)})
    assert settings is not None
    assert settings.speculation == SpeculationSettings(num_speculative_tokens=8, max_spec_offset=1)
    assert settings.is_sharded == sharded
    assert for_vllm(rewritten) == rewritten  # a child process reads the line again


def test_compiled_steps_are_asked_for_by_vllms_flag() -> None:
    rewritten = for_vllm(["serve", "M", "--sequence-parallel-size", "2", "--no-enforce-eager"])
    assert "--no-enforce-eager" in rewritten
    assert "--enforce-eager" not in rewritten


def speculator(folder: Path, **entries: object) -> str:
    """An option with a speculator for a Llama of 16 tokens and 8 channels, in a folder."""
    folder.mkdir(exist_ok=True)
    config: dict[str, object] = {"architectures": ["ArcticMLPSpeculatorPreTrainedModel"], "n_predict": 3}
    config |= {"vocab_size": 16, "emb_dim": 8, "inner_dim": 4, "base_model_archs": ["LlamaForCausalLM"], **entries}
    (folder / "config.json").write_text(json.dumps(config))
    return json.dumps({"method": "arctic", "model": folder.name})


def test_vllms_flags_of_single_entries_are_understood() -> None:
    whole = for_vllm(["serve", "M", "--speculative-config", '{"method": "suffix", "num_speculative_tokens": 5}'])
    assert for_vllm(["serve", "M", "--spec-method", "suffix", "--spec-tokens=5"]) == whole
    assert for_vllm(["serve", "M", "-sc", '{"num_speculative_tokens": 5}', "--spec_method", "suffix"]) == whole
    ngram = ["serve", "M", "--spec-method", "ngram", "--spec-tokens", "3"]
    assert for_vllm(ngram) == ngram
    assert for_vllm([*ngram, "--n", "2", "--sequence-parallel-size", "2"])[:8] == [*ngram, "--n", "2"]


@pytest.mark.parametrize("entry", ["tensor_parallel_size: 2", "worker-cls: a.B", "enable-shift-parallel: true"])
def test_a_file_of_flags_gives_none_that_are_rewritten(entry: str) -> None:
    Path("flags.yaml").write_text(f"port: 8001\n{entry}\n")
    Path("others.yaml").write_text("port: 8001\nmax-model-len: 64\n")
    line = ["serve", "M", "--sequence-parallel-size", "2", "--config"]
    with pytest.raises(ConfigError, match=f"flags.yaml gives --{entry.split(':')[0].replace('_', '-')}"):
        for_vllm([*line, "flags.yaml"])
    for name in ("others.yaml", "absent.yaml"):
        assert for_vllm([*line, name])[2:4] == ["--config", name]
    assert for_vllm(["serve", "M", "--config", "flags.yaml"]) == ["serve", "M", "--config", "flags.yaml"]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_speculator_runs_eagerly_on_one_rank_and_on_several(sharded: bool) -> None:
    model = {"architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 8}
    Path("M/config.json").write_text(json.dumps(model))
    line = ["serve", "M", "--speculative-config", speculator(Path("S"))]
    rewritten = for_vllm(line + ["--sequence-parallel-size", "2"] * sharded)
    assert json.loads(rewritten[rewritten.index("--speculative-config") + 1])["num_speculative_tokens"] == 3
    assert rewritten.count("--enforce-eager") == 1
    settings = LlmParallelConfig.from_additional_config({"omni_sp": settings_in(rewritten)})
    assert settings is not None
    assert settings.keeps_states
    assert settings.speculation == SpeculationSettings(head="S", head_tokens=3, enable_suffix=False)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"vocab_size": 17}, "vocab_size 17, and the model 16"),
        ({"emb_dim": 16}, "width of hidden states 16, and the model 8"),
        ({"base_model_archs": ["Qwen2ForCausalLM"]}, "trained for Qwen2ForCausalLM .* is a LlamaForCausalLM"),
    ],
)
def test_a_speculator_of_another_model_is_refused_before_anything_starts(
    entries: dict[str, object], message: str
) -> None:
    model = {"architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 8}
    Path("M/config.json").write_text(json.dumps(model))
    with pytest.raises(ConfigError, match=message):
        for_vllm(["serve", "M", "--speculative-config", speculator(Path("S"), **entries)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('--speculative-config {"method":"suffix"} --worker-cls mine.Worker', "--worker-cls"),
        ("--speculative-config.method suffix", "one JSON object"),
        ('--speculative-config {"method":"suffix","num_speculative_token":3}', "'num_speculative_tokens'"),
        ("--speculative-config.method arctic --speculative-config.model S", "one JSON object"),
        ("-sc.method suffix", "one JSON object"),
        ('-sc {"method":"suffix"} -sc.num_speculative_tokens 3', "one JSON object"),
        ('-sc {"method":"suffix"} --spec-method suffix', "spec_method"),
        ("--spec-method suffix --spec-tokens many", "num_speculative_tokens"),
        ("--spec-method suffix --worker-cls mine.Worker", "--worker-cls"),
        ("--spec-method eagle3 --spec-model x --sequence-parallel-size 2", "'eagle3'"),
        ("--enable-shift-parallel", "--ulysses-sequence-parallel-size"),
        ("--sequence-parallel-size 2 --enable-shift-parallel=false", "takes no value"),
        ("--sequence-parallel-size 2 --enable-shift-parallel --no-enforce-eager", "leave --no-enforce-eager"),
        ("--sequence-parallel-size 2 --tensor-parallel 2", "--tensor-parallel-size"),
        ("--sequence-parallel-size 2 -tp 0", "from 1 on"),
        ('--spec-method suffix --additional {"a":1}', "--additional-config"),
        ("--sequence-parallel-size 2 --speculative.method suffix", "--speculative-config"),
        ("--sequence-parallel-size 2 --shift-parallel-threshold 9", "--enable-shift-parallel"),
        ("--sequence-parallel-size two", "whole number"),
        ("--sequence-parallel-size 0", "from 1 on"),
        ("--sequence-parallel-size", "needs a value"),
        ("--sequence-parallel-size 2 --enable-lora", "LoRA"),
        ("--sequence-parallel-size 2 --pipeline-parallel-size 2", "pipeline parallelism"),
        ("--sequence-parallel-size 2 --runner pooling", "generates text, and this runs for 'pooling'"),
        ("--sequence-parallel-size 2 -dcp 2", "leave decode_context_parallel_size"),
        ("--sequence-parallel-size 2 --prefill-context-parallel-size 2", "leave prefill_context_parallel_size"),
        ("--sequence-parallel-size 2 --enable-dbo", "microbatches"),
        ("--sequence-parallel-size 2 -dp 2", "data parallelism"),
        ("--sequence-parallel-size 2 --enable-shift-parallel --quantization gptq", "quantised by 'gptq'"),
        ("--sequence-parallel-size 2 -tp 2 -q awq", "quantised by 'awq'"),
        ('--sequence-parallel-size 2 --speculative-config {"method":"eagle3","model":"x"}', "'eagle3'"),
        ("--sequence-parallel-size 2 --additional-config []", "JSON object"),
        ("--sequence-parallel-size 2 --additional-config {", "no JSON"),
        ('--sequence-parallel-size 2 --additional-config {"omni_sp":{}}', "one place"),
    ],
)
def test_invalid_flags_are_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        for_vllm(["serve", "M", *line.split()])


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        for_vllm(["serve", str(tmp_path), "--sequence-parallel-size", "2"])
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        for_vllm(["--model", str(tmp_path), "--sequence-parallel-size", "2"])


@pytest.mark.parametrize(
    ("entries", "flags", "message"),
    [
        ({"num_attention_heads": 6}, "--sequence-parallel-size 4", "6 attention heads"),
        ({"rope_scaling": {"mrope_section": [8, 12, 12]}}, "--sequence-parallel-size 2", "mrope"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "--sequence-parallel-size 2", "dual chunk attention"),
        ({"rope_parameters": {"mrope_section": [8, 12, 12]}}, "--sequence-parallel-size 2", "mrope"),
        ({"quantization_config": {"quant_method": "gptq"}}, "--sequence-parallel-size 2 -tp 2", "'gptq'"),
    ],
)
def test_an_unsupported_model_is_refused_before_anything_starts(
    tmp_path: Path, entries: dict[str, object], flags: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **entries}))
    with pytest.raises(ConfigError, match=message):
        for_vllm(["serve", str(tmp_path), *flags.split()])


def test_quantised_weights_go_with_ulysses_alone(tmp_path: Path) -> None:
    content = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert for_vllm(["serve", str(tmp_path), "--sequence-parallel-size", "2"])


@pytest.mark.parametrize("scheme", ["fp8", "fp8_per_channel"])
def test_weights_in_fp8_go_with_shift_and_inner_tensor_parallelism(scheme: str) -> None:
    flags = f"--sequence-parallel-size 2 -tp 2 --enable-shift-parallel --quantization {scheme}"
    assert scheme in for_vllm(["serve", "M", *flags.split()])


def test_a_swiftkv_model_takes_our_flags_and_needs_none(tmp_path: Path) -> None:
    content = {"architectures": ["LlamaSwiftKVForCausalLM"], "model_type": "llama_swiftkv"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert settings_in(for_vllm(["serve", str(tmp_path), "--sequence-parallel-size", "2"]))["swiftkv"] is False
    assert for_vllm(["serve", str(tmp_path)]) == ["serve", str(tmp_path)]  # vLLM's configuration is completed later


def test_steps_are_counted_in_a_file_that_the_settings_name() -> None:
    line = ["serve", "M", "--sequence-parallel-size", "2"]
    assert settings_in(for_vllm(line))["step_counts_file"] is None
    settings = LlmParallelConfig.from_additional_config({"omni_sp": settings_in(for_vllm(line, count_steps=True))})
    assert settings is not None
    path = settings.step_counts_file
    rank, main = StepCounter.open(path), StepCounter.open(path)
    assert rank is not None
    assert main is not None
    rank.add_model()
    rank.add_step(9, is_ulysses=True)
    rank.add_step(1, is_ulysses=False)
    rank.add_step(2, is_ulysses=False)
    assert main.read() == StepCounts(1, 9, 2, 3, 1, -1)
    rank.set_threshold(64)
    assert main.read() == StepCounts(1, 9, 2, 3, 1, 64)
    main.remove()
    main.remove()
    main = start_step_counter()
    main.add_drafts("suffix", drafts=2, tokens=9, accepted=4)
    main.add_step(3, is_ulysses=True)
    main.add_drafts("head", drafts=4, tokens=12)
    main.add_drafts("head", accepted=7)
    main.add_drafts("suffix", drafts=1, tokens=1, accepted=1)
    drafts = {"drafts": 3, "draft_tokens": 10, "accepted_tokens": 5}
    by_head = {"head_drafts": 4, "head_draft_tokens": 12, "head_accepted_tokens": 7}
    assert main.read() == StepCounts(1, 3, 0, 0, 0, -1, **drafts, **by_head)
    assert REGISTRY.get_sample_value("omni_sp_llm_accepted_tokens_total", {"by": "head"}) == 7
    main.add_swiftkv(early_tokens=8, late_tokens=2)
    assert REGISTRY.get_sample_value("omni_sp_llm_swiftkv_tokens_total", {"layers": "late"}) == 2
    assert REGISTRY.get_sample_value("omni_sp_llm_accepted_tokens_total", {"by": "suffix"}) == 5
    assert StepCounter.open(path) is None
    assert StepCounter.open(None) is None


def test_metrics_show_the_newest_engine_of_a_process() -> None:
    for tokens in (5, 7):
        start_step_counter().add_step(tokens, is_ulysses=True)
        assert REGISTRY.get_sample_value("omni_sp_llm_step_tokens_total", {"mode": "ulysses"}) == tokens
