"""What speculation relies on inside vLLM, each checked before it is used; the rest is in internals."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from omni_sp.errors import ConfigError, UnsupportedModelError
from omni_sp.llm.speculation.checkpoint import SpeculatorConfig
from omni_sp.llm.vllm import internals
from omni_sp.llm.vllm.internals import (
    ARCHITECTURES,
    read_config,
    require_attributes,
    require_eager_where_needed,
    runs_on_cpu,
    settings_of,
    unknown_vllm,
)

_VOCABULARY = "vllm.model_executor.layers.vocab_parallel_embedding"
_SAMPLER = "vllm.v1.sample.rejection_sampler"
_LOGITS = "vllm.model_executor.layers.logits_processor"


def stock_worker_class() -> type[Any]:
    """The class of vLLM's own workers on this platform."""
    module, name = ("cpu_worker", "CPUWorker") if runs_on_cpu() else ("gpu_worker", "Worker")
    stock = _import(f"vllm.v1.worker.{module}", name)
    require_attributes(stock, ("load_model",), name)
    found: type[Any] = stock
    return found


def proposer_of(runner: Any) -> Any:
    """The proposer of a worker's runner."""
    require_attributes(runner, ("drafter",), "its runner")
    return runner.drafter


def repair_sampling() -> None:
    """Replace a function of vLLM's verification of drafts where this build's gives numbers that nobody has written.

    In 0.32's build for CPUs, ``expand_batch_to_tokens`` fills a copy of its result, and returns the result unfilled. It
    brings each request's temperature, top-k and top-p to the tokens of its draft, so a step with drafts in which one
    request is sampled at a temperature would give any token at all. Greedy steps do not call it.

    Without Triton, ``apply_sampling_constraints`` looks for the largest top-k of the drafted tokens, also in a step
    without any, and the engine would end.

    Raises:
        ConfigError: this build verifies drafts with Triton's kernels alone, as 0.30's for CPUs does, and there is none.
    """
    if not runs_on_cpu():
        return
    sampler: Any = importlib.import_module(_SAMPLER)
    require_attributes(sampler, ("expand_batch_to_tokens", "apply_sampling_constraints"), _SAMPLER)
    values, ends = torch.tensor([0.5, 0.0, 1.5]), torch.tensor([2, 2, 5], dtype=torch.int32)
    expected = [0.5, 0.5, 1.5, 1.5, 1.5]
    try:
        found = sampler.expand_batch_to_tokens(values, ends, 5, replace_from=0, replace_to=1).tolist()
    except Exception as error:  # whatever it is that comes of calling a kernel of Triton without Triton
        raise ConfigError(
            f"vLLM {internals.version()} cannot verify drafts on this CPU, whoever makes them ({error}): use vLLM 0.31 "
            "or newer, install Triton, or leave --speculative-config"
        ) from error
    if found != expected:
        sampler.expand_batch_to_tokens = expand_batch_to_tokens
    sampler.apply_sampling_constraints = _unless_empty(sampler.apply_sampling_constraints)


def _unless_empty(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of logits (tokens, vocabulary) that returns those of no tokens as they are."""

    def applied(logits: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return apply(logits, *arguments, **named) if len(logits) else logits

    return applied


def expand_batch_to_tokens(
    values: Tensor, ends: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """Repeat each request's value for each token of its draft.

    Args:
        values: (requests,).
        ends: (requests,) the number of tokens up to each request's last one.
        num_tokens: of all requests.
        replace_from: a value that is replaced ...
        replace_to: ... by this one.

    Returns:
        (num_tokens,) values.
    """
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    replaced = values.masked_fill(values == replace_from, replace_to)
    return replaced.repeat_interleave(counts.long(), output_size=num_tokens)


class RequestBatch:
    """A runner's requests, and where their tokens are in the current step.

    Args:
        runner: vLLM's.
        needs_rows: hidden_rows() will be called.
    """

    def __init__(self, runner: Any, *, needs_rows: bool = False) -> None:
        require_attributes(runner, ("input_batch",), "its runner")
        names = ("req_ids", "req_id_to_index", *(("num_computed_tokens_cpu",) if needs_rows else ()))
        require_attributes(runner.input_batch, names, "its runner's input_batch")
        if needs_rows:
            require_attributes(runner, ("query_start_loc",), "its runner")
            require_attributes(runner.query_start_loc, ("np",), "its runner's query_start_loc")
        self._runner = runner

    @property
    def names(self) -> Sequence[str]:
        """The requests' names, by row of the batch."""
        names: Sequence[str] = self._runner.input_batch.req_ids
        return names

    def __contains__(self, name: object) -> bool:
        return name in self._runner.input_batch.req_id_to_index

    def hidden_rows(self, rows: Sequence[int], num_tokens: Any) -> list[int]:
        """For each of these requests, the row of the step's hidden states from which its last token was sampled.

        That token's predecessor is at place ``num_tokens - 2`` of the request, and the step began at the first place
        that was not computed before it. This holds after a prompt's last chunk, a step of one token, and a step that
        verified a draft, whatever was accepted.

        Args:
            rows: of the batch.
            num_tokens: the number of tokens of each request of the batch, new ones included.
        """
        starts, computed = self._runner.query_start_loc.np, self._runner.input_batch.num_computed_tokens_cpu
        return [int(starts[row]) + int(num_tokens[row]) - 2 - int(computed[row]) for row in rows]


def require_heads_fit(vllm_config: Any, speculator: str, config: SpeculatorConfig, target: Any) -> None:
    """Refuse a speculator of another model than the one that runs, and what does not run beside it.

    Args:
        vllm_config: vLLM's.
        speculator: its folder or hub id.
        config: what it is.
        target: the model.

    Raises:
        ConfigError: it was trained for another model, or a setting of vLLM forbids it.
        UnsupportedModelError: the model's class keeps no hidden states.
    """
    if not hasattr(target, "kept_states"):
        raise UnsupportedModelError(
            f"a {type(target).__name__} keeps no hidden states, from which trained speculators draft: they run with "
            f"{', '.join(ARCHITECTURES)}"
        )
    text = read_config(vllm_config, "model_config.hf_text_config")
    require_attributes(text, ("vocab_size", "hidden_size"), "its configuration of the model")
    config.require_fits(
        speculator,
        vocab_size=text.vocab_size,
        width=text.hidden_size,
        architecture=read_config(vllm_config, "model_config.architectures")[0],
    )
    if read_config(vllm_config, "parallel_config.pipeline_parallel_size") > 1:
        raise ConfigError("trained speculators do not run with pipeline parallelism: leave --pipeline-parallel-size")
    if read_config(vllm_config, "parallel_config.use_ubatching"):
        raise ConfigError("trained speculators do not run with microbatches: leave --enable-dbo and --ubatch-size")
    settings = settings_of(vllm_config)
    assert settings is not None, "a trained speculator is one of our settings"
    require_eager_where_needed(vllm_config, settings)


def take_states(target: Any) -> Tensor:
    """The hidden states of the current step, which our model classes keep; they are given once."""
    states: Tensor | None = target.kept_states
    assert states is not None, "a step of the model comes before each draft"
    target.kept_states = None
    return states


class ShardedVocabulary:
    """Layers as long as the vocabulary, of which each rank of vLLM's tensor parallel group holds a part of the tokens.

    They are vLLM's own.

    Attributes:
        dtype: the model's.
    """

    def __init__(self, vllm_config: Any, vocab_size: int) -> None:
        self.dtype: torch.dtype = read_config(vllm_config, "model_config.dtype")
        self._vllm_config = vllm_config
        self._embedding = _import(_VOCABULARY, "VocabParallelEmbedding")
        self._head = _import(_VOCABULARY, "ParallelLMHead")
        processor = _import(_LOGITS, "LogitsProcessor")
        require_attributes(processor, ("get_top_tokens",), f"{_LOGITS}.LogitsProcessor")
        with self.current():
            self._processor = processor(vocab_size)

    def current(self) -> AbstractContextManager[Any]:
        """While the layers are made: some of vLLM's read the configuration that is current."""
        context: AbstractContextManager[Any] = _import("vllm.config", "set_current_vllm_config")(self._vllm_config)
        return context

    def embedding(self, vocab_size: int, width: int) -> nn.Module:
        """An embedding whose result is whole on every rank."""
        layer: nn.Module = self._embedding(vocab_size, width, params_dtype=self.dtype)
        return layer

    def head(self, width: int, vocab_size: int) -> nn.Module:
        """A head without a bias."""
        layer: nn.Module = self._head(vocab_size, width, params_dtype=self.dtype)
        require_attributes(layer, ("quant_method",), "ParallelLMHead")
        require_attributes(layer.quant_method, ("process_weights_after_loading",), "ParallelLMHead.quant_method")
        return layer

    def finish(self, head: Any) -> None:
        """Prepare a head whose weights are loaded, as vLLM prepares its own."""
        head.quant_method.process_weights_after_loading(head)

    def top_tokens(self, head: nn.Module, states: Tensor) -> Tensor:
        """The most likely token of each state: ranks exchange the best of their own tokens alone. A collective."""
        top: Tensor = self._processor.get_top_tokens(head, states)
        return top


def to_device(numbers: Sequence[int], like: Tensor) -> Tensor:
    """Whole numbers as a tensor beside another one."""
    return torch.tensor(numbers, dtype=torch.int64).to(like.device, non_blocking=True)


def _import(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise unknown_vllm(f"has no {name} in {module}") from error
