"""The distillation of SwiftKV models: where it begins, that it learns, and what it saves."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from omni_sp.errors import InvalidInputError, UnsupportedModelError
from omni_sp.llm.swiftkv import reference
from omni_sp.testing.models import save_language_model
from training.swiftkv.__main__ import main
from training.swiftkv.data import random_sequences, read_sequences
from training.swiftkv.distill import compare, distill
from training.swiftkv.settings import Settings
from training.swiftkv.student import build_student, export, learning

VOCABULARY, LENGTH, FIRST, GROUP = 64, 32, 3, 2


def teacher(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.06, **changes,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_a_student_begins_with_its_teachers_weights_and_shares_them(tied: bool) -> None:
    made = teacher(tie_word_embeddings=tied)
    student = build_student(made, FIRST, GROUP)
    weights, before, own = dict(student.named_parameters()), made.state_dict(), learning(student)
    assert sorted(name.split(".")[2] for name in own if "k_proj" in name) == ["3", "5"]
    assert sorted(name.split(".")[2] for name in own if "q_proj" in name) == ["3", "4", "5"]
    assert all(weight.requires_grad == (name in own) for name, weight in weights.items())
    shared = [name for name in weights if name not in own]
    assert all(weights[name].data_ptr() == before[name].data_ptr() for name in shared)
    layers = [f"model.layers.{layer}.self_attn" for layer in (3, 4, 5)]
    mean = (before[f"{layers[0]}.v_proj.weight"] + before[f"{layers[1]}.v_proj.weight"]) / 2
    assert torch.equal(own[f"{layers[0]}.v_proj_swiftkv.weight"], mean)
    assert torch.equal(own[f"{layers[2]}.v_proj_swiftkv.weight"], before[f"{layers[2]}.v_proj.weight"])
    assert torch.equal(own["model.norm_swiftkv.weight"], before["model.layers.3.input_layernorm.weight"])
    ids = random_sequences(VOCABULARY, 2, LENGTH, 0)
    last_alone = build_student(made, 5, 1)  # of whose first late layer nothing has changed yet
    with torch.no_grad():
        assert torch.equal(last_alone(ids).logits, made(ids).logits)


def test_a_student_learns_goes_on_after_an_interruption_and_is_saved(tmp_path: Path) -> None:
    made = teacher()
    student = build_student(made, FIRST, GROUP)
    sequences, held_out = random_sequences(VOCABULARY, 200, LENGTH, 1), random_sequences(VOCABULARY, 16, LENGTH, 2)
    recipe = {"num_key_value_layers": FIRST, "batch_size": 8, "length": LENGTH, "learning_rate": 3e-3}
    frozen = made.model.embed_tokens.weight.clone()
    before = compare(made, student, held_out)
    distill(made, student, sequences, Settings(**recipe, steps=60))  # type: ignore[arg-type]
    after = compare(made, student, held_out)
    assert after.divergence < 0.5 * before.divergence
    assert after.same_choice > before.same_choice
    assert torch.equal(made.model.embed_tokens.weight, frozen)
    export(student, tmp_path, None)
    read = reference.Qwen3SwiftKVForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(read(held_out).logits, student(held_out).logits)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3SwiftKVForCausalLM"]


def test_an_interrupted_run_ends_as_one_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.swiftkv.distill._CHECKPOINT_EVERY", 2)
    made, sequences = teacher(), random_sequences(VOCABULARY, 20, LENGTH, 1)
    settings = Settings(num_key_value_layers=FIRST, steps=4, batch_size=2, length=LENGTH)
    at_once, interrupted, resumed = (build_student(made, FIRST, GROUP) for _ in range(3))
    distill(made, at_once, sequences, settings)
    checkpoint = tmp_path / "state.pt"
    calls = 0

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    hook = interrupted.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        distill(made, interrupted, sequences, settings, checkpoint)
    hook.remove()
    distill(made, resumed, sequences, settings, checkpoint)
    for name, weight in learning(resumed).items():
        assert torch.equal(weight, learning(at_once)[name]), name


def test_a_teacher_in_bfloat16_is_saved_as_such(tmp_path: Path) -> None:
    made = teacher(torch.bfloat16)
    student = build_student(made, FIRST, 1)
    settings = Settings(num_key_value_layers=FIRST, steps=2, batch_size=2, length=LENGTH)
    distill(made, student, random_sequences(VOCABULARY, 4, LENGTH, 1), settings)
    assert all(weight.dtype == torch.float32 for weight in learning(student).values())
    export(student, tmp_path, None)
    read = reference.Qwen3SwiftKVForCausalLM.from_pretrained(tmp_path)
    assert {weight.dtype for weight in read.parameters()} == {torch.bfloat16}


def test_the_program_saves_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_language_model("llama", tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("a red circle on a blue cat " * 40)
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a cat"}]}) + "\n")
    sizes = ["--steps", "1", "--batch-size", "2", "--length", "16", "--num-key-value-layers", "1", "--data"]
    files = [str(tmp_path / name) for name in ("text.txt", "chat.jsonl")]
    main(["--teacher", str(tmp_path / "teacher"), "--output", str(tmp_path / "made"), *sizes, *files])
    assert "prompts skip 1 of 2 layers" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "made").iterdir() if "tokenizer" not in path.name) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main(
            ["--teacher", str(tmp_path / "teacher"), "--output", str(tmp_path / "made"), "--num-key-value-layers", "2"]
        )
    assert "num_key_value_layers=2 of 2 layers" in capsys.readouterr().err


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and texts."""
    folder = tmp_path_factory.mktemp("given")
    save_language_model("llama", folder / "teacher")
    (folder / "broken.jsonl").write_text('{"text": \n')
    (folder / "text").write_text("a red circle on a blue cat " * 40)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output {0}/teacher", "holds a model of LlamaForCausalLM, which would be lost"),
        ("--num-key-value-layers 0", "num_key_value_layers=0"),
        ("--steps 0", "steps=0"),
        ("--batch-size 0", "batch_size=0"),
        ("--temperature 0", "temperature=0.0"),
        ("--learning-rate nan", "learning_rate=nan"),
        ("--length 4096", "--length 4096 is more than the 256 tokens"),
        ("--length 8 --data {0}/absent", "absent"),
        ("--teacher {0}/absent", "absent"),
        ("--length 8 --data {0}/broken.jsonl", "line 1: no JSON"),
        ("--learning-rate 1e30 --length 8", "the training has diverged"),
        ("--length 8 --seed 1", "an interrupted run with length=16, and this one has 8"),
        ("--length 16 --data {0}/text", "an interrupted run with data="),
    ],
)
def test_a_wrong_command_is_one_line(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    before = (given / "teacher" / "config.json").read_text()
    common = ["--teacher", str(given / "teacher"), "--output", str(tmp_path / "made")]
    common += ["--steps", "2", "--threads", "1", "--batch-size", "2", "--num-key-value-layers", "1"]
    if "interrupted" in message:
        student = build_student(transformers.AutoModelForCausalLM.from_pretrained(given / "teacher"), 1, 1)
        optimizer = torch.optim.AdamW(learning(student).values(), lr=2e-4, weight_decay=0.0)
        run = {**asdict(Settings(num_key_value_layers=1, steps=2, batch_size=2, length=16)), "dtype": "float32"}
        run |= {"teacher": str(given / "teacher"), "data": [], "seed": 1 if "--seed" in words else 0}
        state = {"step": 1, "weights": learning(student), "optimizer": optimizer.state_dict(), "run": run}
        (tmp_path / "made").mkdir()
        torch.save(state, tmp_path / "made" / "distillation.pt")
    with pytest.raises(SystemExit) as ended:
        main([*common, *words.format(given).split()])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert (given / "teacher" / "config.json").read_text() == before
    assert not (tmp_path / "made" / "config.json").exists()


def test_what_cannot_be_learnt_from_is_refused(tmp_path: Path) -> None:
    save_language_model("mistral", tmp_path)
    mistral = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="MistralForCausalLM"):
        build_student(mistral, 1, 1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "lines.jsonl").write_text('\n{"prompt": "a"}\n')
    with pytest.raises(InvalidInputError, match="line 1"):
        read_sequences(tokenizer, [tmp_path / "lines.jsonl"], 4)
    (tmp_path / "short.txt").write_text("a cat")
    with pytest.raises(InvalidInputError, match="fewer than one sequence of 400"):
        read_sequences(tokenizer, [tmp_path / "short.txt"], 400)
