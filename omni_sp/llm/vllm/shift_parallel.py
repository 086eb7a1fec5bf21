"""A stock vLLM decoder over ranks that share the tokens of a step, or its heads: the same weights and the same cache.

Every rank holds its shard of the weights by the inner tensor parallel degree T, and in vLLM's paged cache the keys and
values of its 1/(T·S) of the heads over all tokens. A step of many tokens is split over S ranks, which trade tokens for
heads around attention (DeepSpeed-Ulysses, arXiv 2309.14509). In a step of few tokens every rank has all tokens, and
multiplies by rows and columns of the same matrices, as tensor parallelism over all T·S ranks does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_sp.attention.layout import HeadShare, head_shares, split_evenly
from omni_sp.attention.ulysses import GatherHeads, ScatterHeads, UlyssesLayout
from omni_sp.collectives import gather
from omni_sp.llm.vllm import internals
from omni_sp.llm.vllm.autotune import measure, threshold
from omni_sp.llm.vllm.compiled_attention import call_as_operator
from omni_sp.llm.vllm.config import LlmParallelConfig
from omni_sp.llm.vllm.matrix_parts import require_parts, with_inputs, with_outputs
from omni_sp.llm.vllm.step_metrics import StepCounter
from omni_sp.mesh import Axis

_log = logging.getLogger("vllm.omni_sp")  # below vLLM's, whose level and form it takes


class Step:
    """How the current step runs, shared by all layers.

    Attributes:
        is_ulysses: the ranks share the tokens (Ulysses); else every rank has all of them (tensor parallelism).
        attends: False while the two ways are timed: attention would take the same time in both, and there is nothing to
            attend to.
        count: number of tokens.
        lengths: tokens of each rank, at least ``least``: too few tokens are padded with zeros.
        least: 1; in compiled steps 2, because torch.compile takes a size of 0 or 1 for one that never changes.
    """

    def __init__(self, least: int) -> None:
        self.least = least
        self.is_ulysses = True
        self.attends = True
        self.count = 0
        self.lengths: tuple[int, ...] = ()

    def begin(self, count: int, ranks: int, *, is_ulysses: bool) -> None:
        """Describe the next step."""
        self.is_ulysses, self.count = is_ulysses, count
        self.lengths = split_evenly(max(count, self.least * ranks), ranks)


class ShiftParallelModel:
    """Runs the steps of one stock model, some of whose layers it changes in place before their weights are loaded."""

    def __init__(
        self, layers: list[Any], settings: LlmParallelConfig, max_tokens: int, *, compiled: bool = False
    ) -> None:
        self._max_tokens = max_tokens
        self._axis, weights_group = internals.groups(settings)
        self._step = Step(least=2 if compiled else 1)
        self._counter = StepCounter.open(settings.step_counts_file) if internals.world_rank() == 0 else None
        self._layers = [_Layer(layer, settings, self._axis, weights_group, self._step) for layer in layers]
        if compiled:
            for layer in layers:
                call_as_operator(layer.self_attn.attn)
        self._unchecked = [check for layer in self._layers for check in layer.checks]
        self._set_sizes()
        if self._counter is not None and layers:
            _log.info("weights: %s", internals.describe_quantisation(layers[0].mlp.down_proj))
        self._threshold = settings.shift_parallel_threshold if settings.enable_shift_parallel else -1
        if self._counter is not None:
            self._counter.add_model()
            if self._threshold is not None:
                self._counter.set_threshold(self._threshold)

    def run(self, model: Any, input_ids: Any, positions: Tensor, inputs_embeds: Any) -> Tensor:
        """Run one step of the decoder: the last hidden states of all tokens, on every rank."""
        count = positions.shape[-1]
        internals.require_slots(self._layers[0].name, count)
        while self._unchecked:
            self._unchecked.pop()()
        if self._threshold is None:
            self._threshold = self._measure_threshold(model, positions)
        is_ulysses = count > self._threshold
        if self._counter is not None:
            self._counter.add_step(count, is_ulysses=is_ulysses)
        return self._run(model, input_ids, positions, inputs_embeds, is_ulysses=is_ulysses)

    def _measure_threshold(self, model: Any, positions: Tensor) -> int:
        """Time steps of more and more tokens, each way; the cache is neither read nor written."""

        def run(count: int, is_ulysses: bool) -> None:
            zeros = positions.new_zeros(count)
            self._run(model, zeros, zeros, None, is_ulysses=is_ulysses)
            internals.synchronize(positions.device)

        self._step.attends = False
        try:
            trials = measure(run, self._max_tokens, internals.broadcast_from_rank_0)
        finally:
            self._step.attends = True
        measured = threshold(trials)
        if self._counter is not None:
            self._counter.set_threshold(measured)
            times = ", ".join(
                f"{trial.tokens} {trial.tensor_s * 1e3:.2f} / {trial.ulysses_s * 1e3:.2f}" for trial in trials
            )
            _log.info("shift threshold: %d tokens (tokens, ms by tensor parallelism / Ulysses: %s)", measured, times)
        return measured

    def _run(self, model: Any, input_ids: Any, positions: Tensor, inputs_embeds: Any, *, is_ulysses: bool) -> Tensor:
        count = positions.shape[-1]
        was_ulysses = self._step.is_ulysses
        self._step.begin(count, self._axis.size, is_ulysses=is_ulysses)
        if is_ulysses != was_ulysses:
            self._set_sizes()
        if not is_ulysses:
            hidden: Tensor = model(input_ids, positions, None, inputs_embeds)
            return hidden
        embedded = model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        lengths = self._step.lengths
        own = slice(sum(lengths[: self._axis.rank]), sum(lengths[: self._axis.rank + 1]))
        padding = sum(lengths) - count
        if padding:
            embedded, positions = F.pad(embedded, (0, 0, 0, padding)), F.pad(positions, (0, padding))
        # Copies: of a view, torch.compile would also see where it begins, which is another place on each rank.
        own_hidden = model(None, positions[own].clone(), None, embedded[own].clone())
        return gather(own_hidden, lengths, 0, self._axis)[:count]

    def _set_sizes(self) -> None:
        for layer in self._layers:
            layer.set_sizes()


class _Layer:
    """One decoder layer: its four matrices and its attention.

    Attributes:
        checks: of its matrices, to be called when their weights are loaded.
        name: vLLM's name of the layer's KV cache.
    """

    def __init__(self, layer: Any, settings: LlmParallelConfig, axis: Axis, weights_group: Any, step: Step) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._attention, self._step = attention, step
        size = settings.sequence_parallel_size
        inner_rank, sequence_rank = divmod(internals.world_rank(), size)
        inner = internals.InnerRank(inner_rank, settings.tensor_parallel_size)
        tensor_sizes = attention.q_size, attention.kv_size, attention.num_heads, attention.num_kv_heads
        factory = _LinearFactory(
            inner, size, sequence_rank, step, weights_group, uses_parts=settings.enable_shift_parallel
        )
        attention.qkv_proj = factory.column_parallel(attention.qkv_proj, "QKVParallelLinear")
        attention.o_proj = factory.row_parallel(attention.o_proj)
        mlp.gate_up_proj = factory.column_parallel(mlp.gate_up_proj, "MergedColumnParallelLinear")
        mlp.down_proj = factory.row_parallel(mlp.down_proj)
        qkv, head_dim = attention.qkv_proj, attention.head_dim
        ulysses_sizes = qkv.num_heads * head_dim, qkv.num_kv_heads * head_dim, qkv.num_heads, qkv.num_kv_heads
        # The stock forward splits q, k and v by these: all heads of this rank's matrices, or only its own heads.
        self._sizes = {True: ulysses_sizes, False: tensor_sizes}
        self.checks, self.name = factory.checks, attention.attn.layer_name
        heads = head_shares(qkv.num_heads, qkv.num_kv_heads, size)[0]
        _wrap_attention(attention.attn, heads, axis, step)

    def set_sizes(self) -> None:
        """Set the sizes by which the stock forward splits q, k and v in the current step."""
        attention = self._attention
        attention.q_size, attention.kv_size, attention.num_heads, attention.num_kv_heads = self._sizes[
            self._step.is_ulysses
        ]


class _LinearFactory:
    """Makes linear layers with the inner shard of a matrix, of which steps by tensor parallelism use a view."""

    def __init__(
        self, inner: internals.InnerRank, size: int, rank: int, step: Step, weights_group: Any, *, uses_parts: bool
    ) -> None:
        self._inner, self._size, self._rank, self._step = inner, size, rank, step
        self._group, self._uses_parts = weights_group, uses_parts
        self.checks: list[Callable[[], None]] = []

    def column_parallel(self, stock: Any, kind: str) -> Any:
        """For q, k and v, or gate and up: stacked matrices, of each of which a rank uses some rows."""
        linear = self._clone(stock, kind)
        step, size, rank = self._step, self._size, self._rank
        if kind == "QKVParallelLinear":
            share = head_shares(linear.num_heads, linear.num_kv_heads, size)[0][rank]
            counts, spans = _qkv_rows(linear, share)
        else:
            counts = [output // self._inner.world_size for output in linear.output_sizes]
            spans = [(count * rank // size, count * (rank + 1) // size) for count in counts]
        starts = [sum(counts[:index]) for index in range(len(counts))]
        rows = [slice(start + first, start + last) for start, (first, last) in zip(starts, spans, strict=True)]

        def forward(self: Any, hidden: Any) -> tuple[Tensor, None]:
            if step.is_ulysses:
                return self.quant_method.apply(self, hidden, self.bias), None
            return torch.cat([with_outputs(self, own, hidden) for own in rows], dim=-1), None

        linear.forward = MethodType(forward, linear)
        self._check_later(partial(require_parts, linear, outputs=rows))
        return linear

    def row_parallel(self, stock: Any) -> Any:
        """For the output of attention and MLP: a rank uses some columns, and the ranks' products are summed."""
        linear = self._clone(stock, "RowParallelLinear")
        step, group, inner = self._step, self._group, self._inner
        width = linear.input_size_per_partition // self._size
        columns = slice(self._rank * width, (self._rank + 1) * width)
        is_first = inner.rank_in_group == 0 and self._rank == 0

        def forward(self: Any, hidden: Any) -> tuple[Tensor, None]:
            if not step.is_ulysses:
                product = with_inputs(self, columns, hidden, self.bias if is_first else None)
                return internals.reduce_over_world(product), None
            bias = self.bias if inner.rank_in_group == 0 else None
            product = self.quant_method.apply(self, hidden, bias)
            return (product if group is None else group.all_reduce(product)), None

        linear.forward = MethodType(forward, linear)
        self._check_later(partial(require_parts, linear, inputs=[columns]))
        return linear

    def _check_later(self, check: Callable[[], None]) -> None:
        """Keep a check for when the weights are loaded, where parts of them are used at all."""
        if self._uses_parts:
            self.checks.append(check)

    def _clone(self, stock: Any, kind: str) -> Any:
        linear = internals.clone_linear_for(stock, kind, self._inner)
        if self._uses_parts:
            internals.keep_unpacked(linear)
        return linear


def _qkv_rows(linear: Any, share: HeadShare) -> tuple[list[int], list[tuple[int, int]]]:
    """The number of rows of q, k and v in a stacked matrix, and the range of each that belongs to a rank's heads."""
    width = linear.head_size
    counts = [linear.num_heads * width, linear.num_kv_heads * width, linear.num_kv_heads * width]
    spans = [(start * width, stop * width) for start, stop in (share.query, share.key, share.key)]
    return counts, spans


def _wrap_attention(attention: Any, heads: tuple[HeadShare, ...], axis: Axis, step: Step) -> None:
    """Let vLLM's attention layer trade tokens for heads before it, and back after it, in steps by Ulysses."""
    stock = attention.forward
    head_dim = attention.head_size
    num_heads, num_kv_heads = heads[-1].query[1], heads[-1].key[1]

    def attend(query: Tensor, *rest: Any, **named: Any) -> Any:
        return stock(query, *rest, **named) if step.attends else query

    def forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
        if not step.is_ulysses:
            return attend(query, key, value, *rest, **named)
        layout = UlyssesLayout(axis, heads, step.lengths, step.lengths)
        own = query.shape[0]
        scattered = ScatterHeads(
            query.view(1, own, num_heads, head_dim),
            key.view(1, own, num_kv_heads, head_dim),
            value.view(1, own, num_kv_heads, head_dim),
            None,
            layout,
        )
        # As many tokens as the cache has slots: a padding token would overwrite another request's keys and values.
        query, key, value = (tensor[0, : step.count] for tensor in scattered.wait()[:3])
        out = attend(query.flatten(1), key.flatten(1), value.flatten(1), *rest, **named)
        padding = sum(step.lengths) - step.count
        out = F.pad(out, (0, 0, 0, padding)) if padding else out
        gathered = GatherHeads(out.view(1, sum(step.lengths), -1, head_dim), layout)
        result = out.new_empty(1, own, num_heads, head_dim)
        gathered.write(result)
        return result.view(own, -1)

    attention.forward = forward
