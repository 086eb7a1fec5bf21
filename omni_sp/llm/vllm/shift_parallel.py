"""A stock vLLM decoder over ranks that share its tokens, or its heads in steps of few: the same weights, one cache.

Every rank holds its share of the weights by the inner tensor parallel degree T, and in vLLM's paged cache the keys and
values of its 1/(T·S) of the heads over all tokens. A step of many tokens is cut over the S ranks; around attention,
tokens are traded for heads. A step of few tokens is whole on every rank, which multiplies by rows and columns of the
same matrices, as tensor parallelism over all T·S ranks does.
"""

from __future__ import annotations

import logging
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

from omni_sp.attention.layout import HeadShare, head_shares, split_evenly
from omni_sp.attention.ulysses import GatherHeads, ScatterHeads, UlyssesLayout
from omni_sp.collectives import gather
from omni_sp.llm.vllm import internals
from omni_sp.llm.vllm.autotune import measure, threshold
from omni_sp.llm.vllm.config import LlmParallelConfig
from omni_sp.llm.vllm.step_metrics import StepCounter
from omni_sp.mesh import Axis

_log = logging.getLogger("vllm.omni_sp")  # below vLLM's, whose level and form it takes


class Step:
    """How the step under way runs, for every layer to look at.

    Attributes:
        is_ulysses: tokens are cut (Ulysses); else every rank has all of them (tensor parallelism).
        attends: False while ways are timed: there is nothing to attend to, and it would take both alike.
        count: tokens of the step. lengths: how many of them each rank holds. Where there are fewer tokens than ranks,
            zeros are added at the end, so that no rank runs on nothing.
    """

    def __init__(self) -> None:
        self.is_ulysses = True
        self.attends = True
        self.count = 0
        self.lengths: tuple[int, ...] = ()

    def begin(self, count: int, ranks: int, *, is_ulysses: bool) -> None:
        """Note what the next step is."""
        self.is_ulysses, self.count = is_ulysses, count
        self.lengths = split_evenly(max(count, ranks), ranks)


class ShiftParallelModel:
    """Changes the instances of one stock model; see the module.

    Args:
        model: vLLM's ``...ForCausalLM``, just made, without weights. settings: the degrees.
        most: the most tokens of a step.
    """

    def __init__(self, model: Any, settings: LlmParallelConfig, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._axis, weights_group = internals.groups(settings)
        self._step = Step()
        self._counter = StepCounter.open(settings.step_counts_file) if internals.world_rank() == 0 else None
        self._layers = [
            _Layer(layer, settings, self._axis, weights_group, self._step) for layer in internals.decoder_layers(model)
        ]
        self._unchecked = [
            linear for layer in self._layers for linear in layer.unpacked
        ]  # before their weights are loaded
        self._set_sizes()
        if self._counter is not None:
            self._counter.add_model()
        self._threshold = settings.shift_parallel_threshold if settings.enable_shift_parallel else -1
        if self._counter is not None and self._threshold is not None:
            self._counter.set_threshold(self._threshold)

    def run(self, model: Any, input_ids: Any, positions: torch.Tensor, inputs_embeds: Any) -> torch.Tensor:
        """One step of the decoder: the last hidden states of all tokens, on every rank."""
        count = positions.shape[-1]
        internals.require_slots(self._layers[0].name, count)
        while self._unchecked:
            internals.require_unpacked(self._unchecked.pop())
        if self._threshold is None:
            self._threshold = self._measured_threshold(model, positions)
        is_ulysses = count > self._threshold
        if self._counter is not None:
            self._counter.add_step(count, is_ulysses=is_ulysses)
        return self._run(model, input_ids, positions, inputs_embeds, is_ulysses=is_ulysses)

    def _measured_threshold(self, model: Any, positions: torch.Tensor) -> int:
        """Time steps of more and more tokens, each way; the cache is neither read nor written."""

        def run(count: int, is_ulysses: bool) -> None:
            nothing = positions.new_zeros(count)
            self._run(model, nothing, nothing, None, is_ulysses=is_ulysses)
            internals.synchronize(positions.device)

        self._step.attends = False
        try:
            trials = measure(run, self._max_tokens, internals.broadcast_from_rank_0)
        finally:
            self._step.attends = True
        found = threshold(trials)
        if self._counter is not None:
            self._counter.set_threshold(found)
            told = ", ".join(
                f"{trial.tokens} {trial.tensor_s * 1e3:.2f} / {trial.ulysses_s * 1e3:.2f}" for trial in trials
            )
            _log.info("shift threshold: %d tokens (tokens, ms by tensor parallelism / Ulysses: %s)", found, told)
        return found

    def _run(
        self, model: Any, input_ids: Any, positions: torch.Tensor, inputs_embeds: Any, *, is_ulysses: bool
    ) -> torch.Tensor:
        count = positions.shape[-1]
        before = self._step.is_ulysses
        self._step.begin(count, self._axis.size, is_ulysses=is_ulysses)
        if self._step.is_ulysses != before:
            self._set_sizes()
        if not is_ulysses:
            hidden: torch.Tensor = model(input_ids, positions, None, inputs_embeds)
            return hidden
        embedded = model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        lengths = self._step.lengths
        mine = slice(sum(lengths[: self._axis.rank]), sum(lengths[: self._axis.rank + 1]))
        filler = sum(lengths) - count
        if filler:
            embedded, positions = F.pad(embedded, (0, 0, 0, filler)), F.pad(positions, (0, filler))
        own = model(None, positions[mine].contiguous(), None, embedded[mine].contiguous())
        return gather(own, lengths, 0, self._axis)[:count]

    def _set_sizes(self) -> None:
        for layer in self._layers:
            layer.set_sizes()


class _Layer:
    """One decoder layer: its four matrices and its attention.

    Attributes:
        kept: matrices that are to stay as they are loaded. name: what vLLM calls its part of the cache.
    """

    def __init__(self, layer: Any, settings: LlmParallelConfig, axis: Axis, weights_group: Any, step: Step) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._attention, self._step = attention, step
        rank, size = internals.world_rank(), settings.sequence_parallel_size
        inner = internals.InnerRank(rank // size, settings.tensor_parallel_size)
        tensor_sizes = attention.q_size, attention.kv_size, attention.num_heads, attention.num_kv_heads
        made = _LinearFactory(
            inner, size, rank % size, step, weights_group, keep_unpacked=settings.enable_shift_parallel
        )
        attention.qkv_proj = made.columns(attention.qkv_proj, "QKVParallelLinear")
        attention.o_proj = made.rows(attention.o_proj)
        mlp.gate_up_proj = made.columns(mlp.gate_up_proj, "MergedColumnParallelLinear")
        mlp.down_proj = made.rows(mlp.down_proj)
        qkv, head_dim = attention.qkv_proj, attention.head_dim
        ulysses_sizes = qkv.num_heads * head_dim, qkv.num_kv_heads * head_dim, qkv.num_heads, qkv.num_kv_heads
        # The stock forward splits q, k and v by these: of all heads that the matrices here have, or of this rank's own.
        self._sizes = {True: ulysses_sizes, False: tensor_sizes}
        self.unpacked, self.name = made.unpacked, attention.attn.layer_name
        heads = head_shares(qkv.num_heads, qkv.num_kv_heads, size)[0]
        _wrap_attention(attention.attn, heads, axis, step)

    def set_sizes(self) -> None:
        """Let the stock forward split q, k and v as the step under way needs it."""
        attention = self._attention
        attention.q_size, attention.kv_size, attention.num_heads, attention.num_kv_heads = self._sizes[
            self._step.is_ulysses
        ]


class _LinearFactory:
    """Makes linear layers that hold the inner share of a matrix, and use a part of it in steps of few tokens."""

    def __init__(
        self, inner: internals.InnerRank, size: int, place: int, step: Step, weights_group: Any, *, keep_unpacked: bool
    ) -> None:
        self._inner, self._size, self._place, self._step = inner, size, place, step
        self._group, self._keep_unpacked = weights_group, keep_unpacked
        self.unpacked: list[Any] = []

    def columns(self, stock: Any, kind: str) -> Any:
        """For q, k and v, or gate and up: several matrices side by side, of each of which a rank uses its rows."""
        linear = self._made(stock, kind)
        step, size, place = self._step, self._size, self._place
        if kind == "QKVParallelLinear":
            share = head_shares(linear.num_heads, linear.num_kv_heads, size)[0][place]
            counts, spans = _qkv_rows(linear, share)
        else:
            counts = [output // self._inner.world_size for output in linear.output_sizes]
            spans = [(count * place // size, count * (place + 1) // size) for count in counts]
        starts = [sum(counts[:index]) for index in range(len(counts))]
        rows = [slice(start + first, start + last) for start, (first, last) in zip(starts, spans, strict=True)]

        def forward(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
            if step.is_ulysses:
                return self.quant_method.apply(self, hidden, self.bias), None
            bias = self.bias
            parts = [F.linear(hidden, self.weight[own], None if bias is None else bias[own]) for own in rows]
            return torch.cat(parts, dim=-1), None

        linear.forward = MethodType(forward, linear)
        return linear

    def rows(self, stock: Any) -> Any:
        """For the way back: one matrix, of which a rank uses its columns, and the ranks' products are added up."""
        linear = self._made(stock, "RowParallelLinear")
        step, group, inner = self._step, self._group, self._inner
        width = linear.input_size_per_partition // self._size
        own = slice(self._place * width, (self._place + 1) * width)
        is_first = inner.rank_in_group == 0 and self._place == 0

        def forward(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
            if not step.is_ulysses:
                product = F.linear(hidden, self.weight[:, own], self.bias if is_first else None)
                return internals.reduce_over_world(product), None
            bias = self.bias if inner.rank_in_group == 0 else None
            product = self.quant_method.apply(self, hidden, bias)
            return (product if group is None else group.all_reduce(product)), None

        linear.forward = MethodType(forward, linear)
        return linear

    def _made(self, stock: Any, kind: str) -> Any:
        linear = internals.clone_linear_for(stock, kind, self._inner)
        if self._keep_unpacked:
            internals.keep_unpacked(linear)
            self.unpacked.append(linear)
        return linear


def _qkv_rows(linear: Any, share: HeadShare) -> tuple[list[int], list[tuple[int, int]]]:
    """The rows of q, k and v in a fused matrix, and which of each belong to a rank's heads."""
    width = linear.head_size
    counts = [linear.num_heads * width, linear.num_kv_heads * width, linear.num_kv_heads * width]
    spans = [(start * width, stop * width) for start, stop in (share.query, share.key, share.key)]
    return counts, spans


def _wrap_attention(attention: Any, heads: tuple[HeadShare, ...], axis: Axis, step: Step) -> None:
    """Have vLLM's attention layer trade tokens for heads before, and back after, where a step shares tokens."""
    stock = attention.forward
    head_dim = attention.head_size
    num_heads, num_kv_heads = heads[-1].query[1], heads[-1].key[1]

    def attend(query: torch.Tensor, *rest: Any, **named: Any) -> Any:
        return stock(query, *rest, **named) if step.attends else query

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any) -> Any:
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
        # As many rows as the cache has slots for: a row of filler would overwrite what is somebody's.
        query, key, value = (tensor[0, : step.count] for tensor in scattered.wait()[:3])
        out = attend(query.flatten(1), key.flatten(1), value.flatten(1), *rest, **named)
        filler = sum(step.lengths) - step.count
        out = F.pad(out, (0, 0, 0, filler)) if filler else out
        gathered = GatherHeads(out.view(1, sum(step.lengths), -1, head_dim), layout)
        result = out.new_empty(1, own, num_heads, head_dim)
        gathered.write(result)
        return result.view(own, -1)

    attention.forward = forward
