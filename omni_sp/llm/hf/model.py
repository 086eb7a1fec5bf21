"""A language model of transformers over several ranks: each computes its own tokens, only attention needs the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omni_sp.errors import InvalidInputError, UnsupportedAttentionError, UnsupportedModelError
from omni_sp.llm.hf.attention import ATTENTION, AttentionPhase, Prefill, attention
from omni_sp.llm.hf.generate import Streamer, greedy
from omni_sp.llm.hf.kv_cache import TokenCache
from omni_sp.llm.hf.sequence_shard import SequenceShard, key_mask, prompt_layout, require_same_inputs
from omni_sp.mesh import ParallelMesh

_MODELS = ("Llama", "Mistral", "Qwen2", "Qwen3")
_GROWING_ROPE = ("dynamic", "longrope")
_OPTIONS = {"output_hidden_states", "output_attentions", "return_dict"}


def parallelize(model: Any, mesh: ParallelMesh, *, kernel: str = "auto") -> ParallelModel:
    """Let the ranks of ``mesh`` share the tokens of every prompt.

    Afterwards all ranks call ``model(...)`` with the same, whole prompt, and each gets the same, whole answer; or they
    call ``generate`` of what is returned. Weights are whole on every rank. Only this instance changes.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 of transformers, ``…ForCausalLM`` or the ``…Model`` without a head, as
            text encoders are; in eval mode.
        mesh: the ranks. kernel: "auto", or one of ``omni_sp.attention.kernel_names()``.

    Raises:
        UnsupportedModelError: another class, a model that is parallelized already, or positions that would grow
            differently on the ranks.
    """
    return ParallelModel(model, mesh, kernel)


@dataclass(frozen=True)
class LocalTokens:
    """One rank's part of a result: ``hidden`` (batch, tokens, hidden size), and at which ``positions`` (tokens,)."""

    hidden: torch.Tensor
    positions: torch.Tensor


class ParallelModel:
    """A model whose prompts the ranks share; made by :func:`parallelize`.

    Attributes:
        model: as given. mesh: the ranks. base: its layers without the head. head: hidden states to logits, or None.
        kernel: of the attention.
    """

    def __init__(self, model: Any, mesh: ParallelMesh, kernel: str) -> None:
        self.model, self.mesh, self.kernel = model, mesh, kernel
        self.base, self.head = _split_head(model)
        _register()
        self._cache: TokenCache | None = None
        self._undo: list[Callable[[], None]] = []
        self._base_forward = self.base.forward
        config = copy.copy(self.base.config)
        config._attn_implementation = ATTENTION
        for layer in self.base.layers:
            self._replace(layer.self_attn, "config", config)
        self._replace(self.base, "forward", self._forward)
        if self.head is not None:
            self._replace(model, "forward", self._forward_with_head)

    def _replace(self, module: Any, name: str, value: Any) -> None:
        """Set what belongs to this instance alone, and remember how it was."""
        own = vars(module)
        if name in own:
            before = own[name]
            self._undo.append(lambda: setattr(module, name, before))
        else:
            self._undo.append(lambda: delattr(module, name))
        setattr(module, name, value)

    def remove(self) -> None:
        """Give the model back as it was. Doing so twice is fine."""
        while self._undo:
            self._undo.pop()()

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        max_new_tokens: int,
        attention_mask: torch.Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        prefill_chunk: int | None = None,
        streamer: Streamer | None = None,
    ) -> torch.Tensor:
        """The most likely next token, again and again; keys and values stay in pieces on the ranks.

        All ranks call it with the same. Plain greedy decoding: of the model's generation config only the ids of end and
        padding are read.

        Args:
            input_ids: (batch, tokens), whole. max_new_tokens: at most so many are added.
            attention_mask: (batch, tokens), 0 = padding: on the left, on the right or in between, each row answers as
                it does alone.
            eos_token_id: a row ends with any of these; None means the model's own, ``()`` none.
            pad_token_id: follows a row that has ended before others; None means the model's own.
            prefill_chunk: tokens of the prompt, of all ranks together, that pass through the model at a time; None is
                all. Less memory for activations, the same answer.
            streamer: as transformers has them: ``put(prompt)``, ``put(tokens)`` for each step, ``end()``. Usually
                given on one rank alone.

        Returns:
            (batch, tokens + new tokens), the same on all ranks.

        Raises:
            InvalidInputError: an argument that cannot be. UnsupportedAttentionError: a window shorter than the row.
            ShardingError: the ranks were called with different prompts.
        """
        self._require_applied()
        return greedy(
            self,
            input_ids,
            max_new_tokens=max_new_tokens,
            attention_mask=attention_mask,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            prefill_chunk=prefill_chunk,
            streamer=streamer,
        )

    def cache_bytes(self) -> int:
        """Bytes that this rank's keys and values take in the generation under way; 0 where there is none."""
        return 0 if self._cache is None else self._cache.num_bytes

    def set_cache(self, cache: TokenCache | None) -> None:
        """Say what :meth:`cache_bytes` counts."""
        self._cache = cache

    def local_hidden_states(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> LocalTokens:
        """The last hidden states of this rank's tokens alone: nothing is gathered."""
        output, shard = self._prefill(input_ids, None, attention_mask, position_ids, {})
        return LocalTokens(output.last_hidden_state[:, : shard.tokens], shard.positions)

    def run(self, phase: AttentionPhase, position_ids: torch.Tensor, **inputs: Any) -> Any:
        """The model's own code, without its head, over this rank's tokens.

        Args:
            position_ids: (batch or 1, tokens). inputs: ``input_ids`` or ``inputs_embeds``, and options.
        """
        self._require_applied()
        if self.model.training:
            raise UnsupportedModelError("the model is in training mode: call model.eval(); nothing here has gradients")
        # A mask of four dims is handed through as it is. Attention does not read it, and none is made for these tokens,
        # whose positions are not what the model's code would take them for.
        unread = position_ids.new_zeros(1, 1, 1, 1)
        return self._base_forward(
            attention_mask=unread, position_ids=position_ids, use_cache=False, omni_sp=phase, **inputs
        )

    def _require_applied(self) -> None:
        if not self._undo:
            raise InvalidInputError("remove() took the ranks off this model: parallelize() it again")

    def _prefill(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Any, SequenceShard]:
        """This rank's part of a forward."""
        whole = input_ids if input_ids is not None else inputs_embeds
        if whole is None or (input_ids is not None and inputs_embeds is not None):
            raise InvalidInputError("give input_ids or inputs_embeds, one of them")
        batch, tokens = whole.shape[:2]
        if not tokens or not batch:
            raise InvalidInputError(f"a prompt of shape {(batch, tokens)}: at least one row of one token is needed")
        mask = key_mask(attention_mask, whole)
        if position_ids is None:
            position_ids = torch.arange(tokens, device=whole.device)[None]
        sizes = {"batch": batch, "tokens": tokens}
        tensors = {"attention_mask": mask, "position_ids": position_ids, "input_ids": input_ids}
        require_same_inputs(self.mesh.sequence, **sizes, **tensors)
        shard = SequenceShard(prompt_layout(tokens, self.mesh), self.mesh.sequence, whole.device)
        phase = Prefill(self.mesh, shard, None if mask is None else shard.shard_tokens(mask), tokens, self.kernel)
        name = "input_ids" if input_ids is not None else "inputs_embeds"
        inputs = {name: shard.shard_for_model(whole)}
        return self.run(phase, shard.shard_for_model(position_ids), **inputs, **options), shard

    def _forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        """In the place of the base model's forward: whole tokens in, whole hidden states out."""
        passed, as_object = self._options(past_key_values, use_cache, options)
        output, shard = self._prefill(input_ids, inputs_embeds, attention_mask, position_ids, passed)
        output.last_hidden_state = shard.gather_tokens(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = _gather_all(output.hidden_states, shard, output.last_hidden_state)
        return output if as_object else output.to_tuple()

    def _forward_with_head(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **options: Any,
    ) -> Any:
        """In the place of the whole model's forward: each rank makes the logits of the wanted tokens it holds."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        assert self.head is not None
        if labels is not None:
            raise InvalidInputError("labels: there is no loss over ranks; ask for logits, and leave labels out")
        passed, as_object = self._options(past_key_values, use_cache, options)
        output, shard = self._prefill(input_ids, inputs_embeds, attention_mask, position_ids, passed)
        wanted = _wanted(logits_to_keep, sum(shard.layout.query))
        require_same_inputs(self.mesh.sequence, logits_to_keep=wanted.numel(), logits=wanted)
        logits = shard.gather_selected(self.head(shard.select(output.last_hidden_state, wanted)), wanted)
        hidden = output.hidden_states
        joined = None if hidden is None else _gather_all(hidden, shard, shard.gather_tokens(output.last_hidden_state))
        result = CausalLMOutputWithPast(logits=logits, hidden_states=joined)
        return result if as_object else result.to_tuple()

    def _options(
        self, past_key_values: Any, use_cache: bool | None, options: dict[str, Any]
    ) -> tuple[dict[str, Any], bool]:
        """What the model's own code is told, and whether the answer is an object; refuses what would not be exact."""
        config = self.base.config
        if past_key_values is not None or use_cache:
            raise InvalidInputError(
                "a call of the model keeps no keys and values: leave past_key_values and use_cache out; "
                "handle.generate(...) keeps them, in pieces, on the ranks"
            )
        unknown = [name for name, value in options.items() if name not in _OPTIONS and value is not None]
        if unknown:
            raise InvalidInputError(f"a model over ranks takes no {', '.join(unknown)}: leave out, or run on one rank")
        passed_on = {name: value for name, value in options.items() if value is not None}
        if passed_on.pop("output_attentions", getattr(config, "output_attentions", False)):
            raise UnsupportedAttentionError(
                "output_attentions: no rank has all of them; leave it out, or run on one rank"
            )
        return passed_on, bool(passed_on.pop("return_dict", getattr(config, "return_dict", True)))


def _split_head(model: Any) -> tuple[Any, Any]:
    """The layers and the head.

    Raises:
        UnsupportedModelError: see :func:`parallelize`.
    """
    import transformers

    bases = {getattr(transformers, f"{name}Model") for name in _MODELS}
    heads = {getattr(transformers, f"{name}ForCausalLM") for name in _MODELS}
    if type(model) not in bases | heads:
        names = ", ".join(f"{name}ForCausalLM, {name}Model" for name in _MODELS)
        raise UnsupportedModelError(
            f"{type(model).__name__} is not one of {names} of transformers: unwrap it (merge adapters, compile "
            "afterwards), or run it on one rank"
        )
    base, head = (model.model, model.get_output_embeddings()) if type(model) in heads else (model, None)
    if any(layer.self_attn.config._attn_implementation == ATTENTION for layer in base.layers):
        raise UnsupportedModelError("this model is parallelized already: call handle.remove() first")
    rope = getattr(base.rotary_emb, "rope_type", "default")
    if rope in _GROWING_ROPE:
        raise UnsupportedModelError(
            f"rope_type {rope!r} chooses its frequencies by the longest position that a rank happens to hold: choose "
            "linear, yarn or llama3, or run this model on one rank"
        )
    return base, head


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)


def _gather_all(hidden: Sequence[torch.Tensor | None], shard: SequenceShard, last: torch.Tensor) -> tuple[Any, ...]:
    """All hidden states whole. The last one is what the model gives as such, joined already."""
    joined = [None if state is None else shard.gather_tokens(state) for state in hidden[:-1]]
    return (*joined, None if hidden[-1] is None else last)


def _wanted(logits_to_keep: int | torch.Tensor, tokens: int) -> torch.Tensor:
    """The positions that transformers would keep: the last so many (0: all), or those named."""
    if isinstance(logits_to_keep, torch.Tensor):
        if logits_to_keep.ndim != 1 or logits_to_keep.dtype == torch.bool:
            raise InvalidInputError(
                f"logits_to_keep of shape {tuple(logits_to_keep.shape)} and {logits_to_keep.dtype}: give a number, or "
                "positions in a tensor of one dim"
            )
        wanted = logits_to_keep.cpu().to(torch.int64)
        if wanted.numel() and (int(wanted.min()) < -tokens or int(wanted.max()) >= tokens):
            raise InvalidInputError(f"logits_to_keep {wanted.tolist()}: the prompt has {tokens} tokens")
        return wanted.remainder(tokens)
    if logits_to_keep < 0:
        raise InvalidInputError(f"logits_to_keep={logits_to_keep}: give 0 for all tokens, or how many of the last")
    return torch.arange(tokens)[slice(-logits_to_keep, None)]
