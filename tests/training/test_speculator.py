"""A speculator that is trained for a minute at most drafts what its target goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from omni_sp.llm.speculation import checkpoint
from omni_sp.llm.speculation.heads import Speculator
from omni_sp.testing.models import save_language_model
from training.speculator.__main__ import main
from training.speculator.data import Sequences, answer, batches, load_answers, random_prompts, save_answers, split_text
from training.speculator.evaluate import Acceptance, simulate
from training.speculator.settings import Settings
from training.speculator.train import build_speculator, train

VOCABULARY = 200


@pytest.fixture(scope="module")
def target() -> Any:
    """A Llama of one layer with random weights, and more tokens than a guess would find."""
    import transformers

    torch.manual_seed(1)
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_the_first_place_is_right_ten_times_as_often_as_a_guess(target: Any, kind: Literal["lstm", "mlp"]) -> None:
    prompts = random_prompts(VOCABULARY, 96, 4, seed=3)
    answers = answer(target, prompts, 24, temperature=0.0, batch_size=96, seed=0)
    settings = Settings(kind=kind, steps=150, batch_size=16, learning_rate=1e-2)
    untrained = simulate(target, build_speculator(target, settings).eval(), answers)
    trained = simulate(target, train(target, answers, settings, quiet=True), answers)
    assert trained.by_place[0] >= 10 * trained.drafts / VOCABULARY, (untrained, trained)
    assert trained.by_place[0] > 3 * untrained.by_place[0]
    assert list(trained.by_place) == sorted(trained.by_place, reverse=True)
    assert trained.by_place[2], "all places are trained"


def test_answers_are_the_targets_own_and_end_at_its_end(target: Any, tmp_path: Path) -> None:
    prompts = [[5, 6, 7], [9], [8, 3, 1], [4]]
    plain = answer(target, prompts, 12, temperature=0.0, batch_size=2, seed=0)
    assert plain.starts == [1, 1, 3, 3]
    for tokens, start in zip(*plain, strict=True):
        with torch.no_grad():
            top = target(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        assert tokens[start:] == top[start - 1 : -1]
        assert len(tokens) == start + 12
    end = plain.tokens[0][4]
    target.generation_config.eos_token_id = end
    try:
        ended = answer(target, prompts, 12, temperature=0.0, batch_size=2, seed=0)
    finally:
        target.generation_config.eos_token_id = None
    assert ended.tokens[0] == plain.tokens[0][: plain.tokens[0].index(end, 1) + 1]
    save_answers(tmp_path / "answers", ended)
    assert load_answers(tmp_path / "answers") == ended
    drawn = [answer(target, prompts, 12, temperature=2.0, batch_size=4, seed=seed).tokens for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_batch_has_no_labels_for_prompts_and_padding() -> None:
    sequences = Sequences([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10], [1, 2]], [2, 0, 0])
    source = batches(sequences, 2, 5, 3, torch.Generator().manual_seed(0))
    ids, labels = next(source)
    order = ids[:, 0].argsort()  # whichever came first
    assert ids[order].tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 10, 0]]
    assert labels[order].tolist() == [[-100, -100, 3, 4, 5], [7, 8, 9, 10, -100]]
    with pytest.raises(SystemExit, match="no sequence has 7 tokens"):
        next(batches(sequences, 2, 9, 7, torch.Generator()))


def test_a_text_is_cut_into_sequences(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abcdefg")
    (tmp_path / "b").write_text("hij")

    def tokenizer(text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(character) for character in text])

    found = split_text(tokenizer, [tmp_path / "a", tmp_path / "b"], 3)
    assert ["".join(map(chr, tokens)) for tokens in found.tokens] == ["abc", "def", "hij"]
    assert found.starts == [0, 0, 0]


def test_a_simulation_goes_on_behind_what_was_accepted(target: Any) -> None:
    class Oracle(Speculator):
        """Drafts the successors of tokens that count up, the third of which is wrong."""

        def draft(self, states: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
            return torch.stack([tokens + 1, tokens + 2, tokens - 1], 1)

    oracle = Oracle(build_speculator(target, Settings()).config)
    found = simulate(target, oracle, Sequences([list(range(20, 32)), [50, 51, 60]], [3, 1]))
    # From token 23 of the first: two accepted and one sampled, twice; then two are left. Then one that is wrong.
    assert found == Acceptance(drafts=4, by_place=[3, 3, 0])


def test_the_command_trains_evaluates_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_language_model("llama", tmp_path / "target")
    (tmp_path / "prompts").write_text("a red circle\na cat\n\n" * 3)
    shared = ["--target", str(tmp_path / "target"), "--output", str(tmp_path / "out"), "--steps", "3", "--threads", "1"]
    main([*shared, "--prompts", str(tmp_path / "prompts"), "--answer-tokens", "8", "--width", "12", "--untied"])
    assert "accepted up to each token" in capsys.readouterr().out
    config = checkpoint.read_config(tmp_path / "out")
    assert (config.kind, config.width, config.tie_weights) == ("lstm", 12, False)
    assert config.base_architectures == ("LlamaForCausalLM",)
    dtypes = {tensor.dtype for _, tensor in checkpoint.weights(tmp_path / "out", config)}
    assert dtypes == {torch.bfloat16}
    answers = tmp_path / "out" / "answers.jsonl"
    assert len(json.loads(answers.read_text().splitlines()[0])["answer"]) <= 8
    main([*shared, "--answers", str(answers), "--safetensors"])
    main([*shared, "--answers", str(answers), "--kind", "mlp", "--dtype", "float32"])
    config = checkpoint.read_config(tmp_path / "out")
    assert config.kind == "mlp"
    found = dict(checkpoint.weights(tmp_path / "out", config))  # not those of the LSTM before it, in another file
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target and answers."""
    folder = tmp_path_factory.mktemp("given")
    save_language_model("llama", folder / "target")
    good = json.dumps({"prompt": [5, 6], "answer": [7, 8, 9, 10, 11]}) + "\n"
    (folder / "good").write_text(good)
    (folder / "answers").write_text(good + '{"prompt": [5]}\n')
    (folder / "unknown").write_text(good.replace("11", "99999"))
    (folder / "words").write_text(good.replace("11", '"a"'))
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output {0}/target", "holds a model of LlamaForCausalLM, which would be lost"),
        ("--output {0}/answers", "is a file"),
        ("--steps 0", "steps=0"),
        ("--n-predict 0", "n_predict=0"),
        ("--width 0", "width=0"),
        ("--learning-rate -1", "learning_rate=-1.0"),
        ("--temperature -1", "--temperature=-1.0"),
        ("--answer-tokens 0", "--answer-tokens=0"),
        ("--target {0}/absent", "absent"),
        ("--prompts {0}/absent", "absent"),
        ("--answers {0}/answers", 'line 2: no {"prompt": [...], "answer": [...]}'),
        ("--answers {0}/unknown", "token 99999, and the target knows"),
        ("--answers {0}/words", "lists of token ids"),
        ("--answers {0}/good --learning-rate 1e30", "the training has diverged"),
    ],
)
def test_a_wrong_command_is_one_line_and_loses_nothing(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (given / "target").iterdir())
    common = ["--target", str(given / "target"), "--output", str(tmp_path / "made")]
    common += ["--steps", "4", "--threads", "1"]
    with pytest.raises(SystemExit) as ended:
        main([*common, *words.format(given).split()])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (given / "target").iterdir()) == before
    assert not (tmp_path / "made" / "config.json").exists()
