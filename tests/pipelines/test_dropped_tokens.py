"""Prompts that are longer than text encoders read: how many tokens of them are dropped, by tokenizer and by prompt."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from omni_sp import Omni, OmniDiffusionSamplingParams
from omni_sp.outputs import dropped_tokens_note
from omni_sp.pipelines.arguments import Prompt, call_arguments, small_arguments
from omni_sp.pipelines.capabilities import inspect_pipeline
from omni_sp.pipelines.dropped_tokens import DroppedTokens
from omni_sp.pipelines.load import load_pipeline, resolve_model
from omni_sp.pipelines.run import run_call
from omni_sp.pipelines.shapes import SHAPES_MODEL
from omni_sp.testing.models import save_sd3, save_z_image

ONE_STEP: dict[str, Any] = {"height": 64, "width": 80, "num_inference_steps": 1, "output_type": "latent"}


def dropped(pipe: Any, text: Any, **values: Any) -> list[dict[str, int]]:
    capabilities = inspect_pipeline(pipe)
    params = OmniDiffusionSamplingParams(num_inference_steps=1, **values)
    arguments = small_arguments(capabilities, call_arguments(capabilities, Prompt(text="a"), params), params)
    return run_call(pipe, arguments | {"prompt": text}, seed=1, device="cpu").dropped_tokens


def loaded(source: str) -> Any:
    pipe = load_pipeline(resolve_model(source), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def shapes() -> Any:
    return loaded(SHAPES_MODEL)


def test_each_tokenizer_is_named(tmp_path: Path) -> None:
    save_sd3(tmp_path)
    pipe = loaded(str(tmp_path))
    assert dropped(pipe, "a cat") == [{}]
    # Every text ends in </s>; 16 tokens are read by the two CLIPs, and 256 by the T5.
    assert dropped(pipe, "red " * 15) == [{}]
    assert dropped(pipe, "red " * 20) == [{"tokenizer": 5, "tokenizer_2": 5}]
    assert dropped(pipe, "red " * 300) == [{"tokenizer": 285, "tokenizer_2": 285, "tokenizer_3": 45}]
    assert dropped(pipe, "a cat", negative_prompt="red " * 18) == [{"tokenizer": 3, "tokenizer_2": 3}]
    assert dropped(pipe, ["red " * 18, "a cat"]) == [{"tokenizer": 3, "tokenizer_2": 3}, {}]


def test_a_chat_template_is_a_part_of_the_text(tmp_path: Path) -> None:
    save_z_image(tmp_path)
    pipe = loaded(str(tmp_path))
    assert dropped(pipe, "red " * 20, max_sequence_length=22) == [{}]  # and "make </s>" of the template
    assert dropped(pipe, "red " * 25, max_sequence_length=22) == [{"tokenizer": 5}]


def test_a_template_that_is_dropped_does_not_count(shapes: Any) -> None:
    """Qwen-Image reads max_sequence_length tokens after its template's 34; the template ends in five more."""
    assert dropped(shapes, "red " * 15, max_sequence_length=21) == [{}]
    assert dropped(shapes, "red " * 20, max_sequence_length=21) == [{"tokenizer": 5}]
    # The tokenizer itself stops at 1024 + 34, and the embeddings are cut after that.
    assert dropped(shapes, "red " * 1100, max_sequence_length=1024) == [{"tokenizer": 82}]
    assert dropped(shapes, "red " * 1100) == [{"tokenizer": 1106 - 512}]
    assert dropped(shapes, ["a red circle", "red " * 20], max_sequence_length=21) == [{}, {"tokenizer": 5}]


def test_tokenizers_are_as_they_were(shapes: Any) -> None:
    before = type(shapes.tokenizer)
    with DroppedTokens(shapes, 1):
        assert type(shapes.tokenizer) is not before
        assert type(shapes.tokenizer).__name__ == before.__name__
        assert shapes.tokenizer("a red circle")["input_ids"]
    assert type(shapes.tokenizer) is before


def test_metrics_say_it() -> None:
    with warnings.catch_warnings(), Omni(SHAPES_MODEL, device="cpu") as omni:
        params = OmniDiffusionSamplingParams(**ONE_STEP, max_sequence_length=21)
        short, long = omni.generate(["a red circle", "red " * 20], params)
    assert short.metrics["dropped_tokens"] == {}
    assert dropped_tokens_note(short.metrics) is None
    assert long.metrics["dropped_tokens"] == {"tokenizer": 5}
    note = "the prompt is longer than the model reads: tokenizer dropped 5 tokens at its end"
    assert dropped_tokens_note(long.metrics) == note
