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

from omni_sp.attention.layout import HeadShare, head_shares, shares
from omni_sp.attention.ulysses import GatherHeads, ScatterHeads, UlyssesLayout
from omni_sp.collectives import gather
from omni_sp.llm import adapter
from omni_sp.llm.settings import LlmParallelConfig
from omni_sp.llm.steps import StepCounter
from omni_sp.llm.threshold import measure, threshold
from omni_sp.mesh import Axis

_log = logging.getLogger("vllm.omni_sp")  # below vLLM's, whose level and form it takes


class Step:
    """How the step under way runs, for every layer to look at.

    Attributes:
        shares_tokens: tokens are cut (Ulysses); else every rank has all of them (tensor parallelism).
        attends: False while ways are timed: there is nothing to attend to, and it would take both alike.
        count: tokens of the step. lengths: how many of them each rank holds. Where there are fewer tokens than ranks,
            zeros are added at the end, so that no rank runs on nothing.
    """

    def __init__(self) -> None:
        self.shares_tokens = True
        self.attends = True
        self.count = 0
        self.lengths: tuple[int, ...] = ()

    def begin(self, count: int, ranks: int, *, shares_tokens: bool) -> None:
        """Note what the next step is."""
        self.shares_tokens, self.count = shares_tokens, count
        self.lengths = shares(max(count, ranks), ranks)


class Weave:
    """Changes the instances of one stock model; see the module.

    Args:
        model: vLLM's ``...ForCausalLM``, just made, without weights. settings: the degrees.
        most: the most tokens of a step.
    """

    def __init__(self, model: Any, settings: LlmParallelConfig, most: int) -> None:
        self._most = most
        self._axis, weights_group = adapter.groups(settings)
        self._step = Step()
        self._counter = StepCounter.of_this_process() if adapter.world_rank() == 0 else None
        self._layers = [
            _Layer(layer, settings, self._axis, weights_group, self._step) for layer in adapter.decoder_layers(model)
        ]
        self._unseen = [linear for layer in self._layers for linear in layer.kept]  # before their weights are loaded
        self._set_sizes()
        if self._counter is not None:
            self._counter.begin()
        self._threshold = settings.shift_parallel_threshold if settings.enable_shift_parallel else -1
        if self._counter is not None and self._threshold is not None:
            self._counter.tell(self._threshold)

    def run(self, model: Any, input_ids: Any, positions: torch.Tensor, inputs_embeds: Any) -> torch.Tensor:
        """One step of the decoder: the last hidden states of all tokens, on every rank."""
        count = positions.shape[-1]
        adapter.require_slots(self._layers[0].name, count)
        while self._unseen:
            adapter.require_kept(self._unseen.pop())
        if self._threshold is None:
            self._threshold = self._measured_threshold(model, positions)
        shares_tokens = count > self._threshold
        if self._counter is not None:
            self._counter.add(count, shares_tokens=shares_tokens)
        return self._run(model, input_ids, positions, inputs_embeds, shares_tokens=shares_tokens)

    def _measured_threshold(self, model: Any, positions: torch.Tensor) -> int:
        """Time steps of more and more tokens, each way; the cache is neither read nor written."""

        def run(count: int, shares_tokens: bool) -> None:
            nothing = positions.new_zeros(count)
            self._run(model, nothing, nothing, None, shares_tokens=shares_tokens)
            adapter.synchronize(positions.device)

        self._step.attends = False
        try:
            trials = measure(run, self._most, adapter.as_rank_0)
        finally:
            self._step.attends = True
        found = threshold(trials)
        if self._counter is not None:
            self._counter.tell(found)
            told = ", ".join(
                f"{trial.tokens} {trial.tensor_s * 1e3:.2f} / {trial.ulysses_s * 1e3:.2f}" for trial in trials
            )
            _log.info("shift threshold: %d tokens (tokens, ms by tensor parallelism / Ulysses: %s)", found, told)
        return found

    def _run(
        self, model: Any, input_ids: Any, positions: torch.Tensor, inputs_embeds: Any, *, shares_tokens: bool
    ) -> torch.Tensor:
        count = positions.shape[-1]
        before = self._step.shares_tokens
        self._step.begin(count, self._axis.size, shares_tokens=shares_tokens)
        if self._step.shares_tokens != before:
            self._set_sizes()
        if not shares_tokens:
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
        rank, size = adapter.world_rank(), settings.sequence_parallel_size
        inner = adapter.InnerRank(rank // size, settings.tensor_parallel_size)
        few = attention.q_size, attention.kv_size, attention.num_heads, attention.num_kv_heads
        made = _Makers(inner, size, rank % size, step, weights_group, keeps=settings.enable_shift_parallel)
        attention.qkv_proj = made.columns(attention.qkv_proj, "QKVParallelLinear")
        attention.o_proj = made.rows(attention.o_proj)
        mlp.gate_up_proj = made.columns(mlp.gate_up_proj, "MergedColumnParallelLinear")
        mlp.down_proj = made.rows(mlp.down_proj)
        qkv, head_dim = attention.qkv_proj, attention.head_dim
        many = qkv.num_heads * head_dim, qkv.num_kv_heads * head_dim, qkv.num_heads, qkv.num_kv_heads
        # The stock forward splits q, k and v by these: of all heads that the matrices here have, or of this rank's own.
        self._sizes = {True: many, False: few}
        self.kept, self.name = made.kept, attention.attn.layer_name
        heads = head_shares(qkv.num_heads, qkv.num_kv_heads, size)[0]
        _exchange_around(attention.attn, heads, axis, step)

    def set_sizes(self) -> None:
        """Let the stock forward split q, k and v as the step under way needs it."""
        attention = self._attention
        attention.q_size, attention.kv_size, attention.num_heads, attention.num_kv_heads = self._sizes[
            self._step.shares_tokens
        ]


class _Makers:
    """Makes linear layers that hold the inner share of a matrix, and use a part of it in steps of few tokens."""

    def __init__(
        self, inner: adapter.InnerRank, size: int, place: int, step: Step, weights_group: Any, *, keeps: bool
    ) -> None:
        self._inner, self._size, self._place, self._step = inner, size, place, step
        self._group, self._keeps = weights_group, keeps
        self.kept: list[Any] = []

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
            if step.shares_tokens:
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
            if not step.shares_tokens:
                product = F.linear(hidden, self.weight[:, own], self.bias if is_first else None)
                return adapter.reduce_over_world(product), None
            bias = self.bias if inner.rank_in_group == 0 else None
            product = self.quant_method.apply(self, hidden, bias)
            return (product if group is None else group.all_reduce(product)), None

        linear.forward = MethodType(forward, linear)
        return linear

    def _made(self, stock: Any, kind: str) -> Any:
        linear = adapter.twin_of(stock, kind, self._inner)
        if self._keeps:
            adapter.keep_weight(linear)
            self.kept.append(linear)
        return linear


def _qkv_rows(linear: Any, share: HeadShare) -> tuple[list[int], list[tuple[int, int]]]:
    """The rows of q, k and v in a fused matrix, and which of each belong to a rank's heads."""
    width = linear.head_size
    counts = [linear.num_heads * width, linear.num_kv_heads * width, linear.num_kv_heads * width]
    spans = [(start * width, stop * width) for start, stop in (share.query, share.key, share.key)]
    return counts, spans


def _exchange_around(attention: Any, heads: tuple[HeadShare, ...], axis: Axis, step: Step) -> None:
    """Have vLLM's attention layer trade tokens for heads before, and back after, where a step shares tokens."""
    stock = attention.forward
    head_dim = attention.head_size
    num_heads, num_kv_heads = heads[-1].query[1], heads[-1].key[1]

    def attend(query: torch.Tensor, *rest: Any, **named: Any) -> Any:
        return stock(query, *rest, **named) if step.attends else query

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if not step.shares_tokens:
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
