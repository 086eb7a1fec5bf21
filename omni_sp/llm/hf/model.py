"""A language model of transformers over several ranks: each computes its own tokens, attention exchanges the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_sp.errors import InvalidInputError, UnsupportedAttentionError, UnsupportedModelError
from omni_sp.llm.hf.attention import ATTENTION, AttentionPhase, Prefill, attention
from omni_sp.llm.hf.generate import Streamer, greedy
from omni_sp.llm.hf.kv_cache import TokenCache
from omni_sp.llm.hf.sequence_shard import SequenceShard, key_mask, prompt_layout, require_same_inputs
from omni_sp.mesh import ParallelMesh
from omni_sp.tested_versions import warn_if_untested

_MODELS = ("Llama", "Mistral", "Qwen2", "Qwen3")
_GROWING_ROPE = ("dynamic", "longrope")
_OPTIONS = {"output_hidden_states", "output_attentions", "return_dict"}


def parallelize(model: Any, mesh: ParallelMesh, *, kernel: str = "auto") -> ParallelModel:
    """Let the ranks of ``mesh`` share the tokens of every prompt.

    Afterwards all ranks call ``model(...)`` with the same, whole prompt, and each gets the same, whole answer; or they
    call ``generate`` of the returned handle. Weights are whole on every rank. Only this instance changes. Attention is
    DeepSpeed-Ulysses (arXiv 2309.14509), a zigzag ring (2310.01889, 2311.09431), or both (2405.07719), by the mesh.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 of transformers in eval mode: ``…ForCausalLM``, or ``…Model`` without a
            head, for text encoders. Or one of the SwiftKV models of `omni_sp.llm.swiftkv.reference`, all of whose
            tokens pass through all layers here.
        mesh: the ranks.
        kernel: "auto", or one of ``omni_sp.attention.kernel_names()``.

    Returns:
        A handle with ``generate`` and ``remove``.

    Raises:
        UnsupportedModelError: another class, a model that is parallelized already, or positions that would grow
            differently on the ranks.
    """
    if mesh.rank == 0:  # the others would say the same
        warn_if_untested("transformers")
    return ParallelModel(model, mesh, kernel)


@dataclass(frozen=True)
class LocalTokens:
    """One rank's tokens of a result.

    Attributes:
        hidden: (batch, tokens, hidden size).
        positions: (tokens,), the tokens' positions in the prompt.
    """

    hidden: Tensor
    positions: Tensor


class ParallelModel:
    """A model whose prompts the ranks share; made by `parallelize`.

    Attributes:
        model: the model of transformers.
        mesh: the ranks.
        base: the model without its head.
        head: the module from hidden states to logits; None where the model has none.
        kernel: the attention kernel.
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
        """Set an attribute of this instance, and note how to restore it."""
        own = vars(module)
        if name in own:
            original = own[name]
            self._undo.append(lambda: setattr(module, name, original))
        else:
            self._undo.append(lambda: delattr(module, name))
        setattr(module, name, value)

    def remove(self) -> None:
        """Restore the model. Idempotent."""
        while self._undo:
            self._undo.pop()()

    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        prefill_chunk: int | None = None,
        streamer: Streamer | None = None,
    ) -> Tensor:
        """Generate greedily. Each rank stores its share of the keys and values.

        All ranks call it with the same arguments. Of the model's generation config only the ids of end and padding are
        read.

        Args:
            input_ids: (batch, tokens), whole.
            max_new_tokens: the most tokens that are added.
            attention_mask: (batch, tokens), 0 = padding, on the left, on the right or in between. Each sequence is
                answered as it is alone.
            eos_token_id: the tokens that end a sequence; None means the model's own, ``()`` none.
            pad_token_id: the token that pads a sequence which ends before others; None means the model's own.
            prefill_chunk: number of tokens of the prompt, of all ranks together, that the model computes at a time;
                None is all. Fewer need less memory for activations, and the answer is the same.
            streamer: called with ``put(prompt)``, ``put(tokens)`` for each step, and ``end()``. It is usually given on
                one rank only.

        Returns:
            (batch, tokens + new tokens), the same on all ranks.

        Raises:
            InvalidInputError: an argument is invalid.
            UnsupportedAttentionError: the model attends to a window shorter than the sequence.
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
        """Bytes of this rank's keys and values in the current generation; 0 where there is none."""
        return 0 if self._cache is None else self._cache.num_bytes

    def set_cache(self, cache: TokenCache | None) -> None:
        """Set the cache that `cache_bytes` counts."""
        self._cache = cache

    def local_hidden_states(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> LocalTokens:
        """Compute the last hidden states of this rank's tokens, and gather nothing.

        Args:
            input_ids: (batch, tokens), whole.
            attention_mask: (batch, tokens), 0 = padding.
            position_ids: (batch or 1, tokens); None counts from 0.
        """
        output, shard = self._prefill(input_ids, None, attention_mask, position_ids, {})
        return LocalTokens(output.last_hidden_state[:, : shard.tokens], shard.positions)

    def run(self, phase: AttentionPhase, position_ids: Tensor, **inputs: Any) -> Any:
        """Run the model's own code, without its head, over this rank's tokens.

        Args:
            phase: how attention is computed.
            position_ids: (batch or 1, tokens).
            **inputs: ``input_ids`` or ``inputs_embeds``, and options of the model.
        """
        self._require_applied()
        if self.model.training:
            raise UnsupportedModelError("the model is in training mode: call model.eval(); nothing here has gradients")
        # The model passes a mask of four dims on unchanged, and our attention ignores it. Without one, the model would
        # build a mask for these tokens, from positions that they do not have.
        ignored = position_ids.new_zeros(1, 1, 1, 1)
        return self._base_forward(
            attention_mask=ignored, position_ids=position_ids, use_cache=False, omni_sp=phase, **inputs
        )

    def _require_applied(self) -> None:
        if not self._undo:
            raise InvalidInputError("remove() took the ranks off this model: parallelize() it again")

    def _prefill(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Any, SequenceShard]:
        """Run the base model on this rank's tokens of whole inputs; its output and the shard."""
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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        """Replace the base model's forward: whole inputs, whole hidden states."""
        model_options, as_object = self._options(past_key_values, use_cache, options)
        output, shard = self._prefill(input_ids, inputs_embeds, attention_mask, position_ids, model_options)
        output.last_hidden_state = shard.gather_tokens(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = _gather_all(output.hidden_states, shard, output.last_hidden_state)
        return output if as_object else output.to_tuple()

    def _forward_with_head(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        """Replace the whole model's forward: each rank computes the logits of its own among the wanted tokens."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        assert self.head is not None
        if labels is not None:
            raise InvalidInputError("labels: there is no loss over ranks; ask for logits, and leave labels out")
        model_options, as_object = self._options(past_key_values, use_cache, options)
        output, shard = self._prefill(input_ids, inputs_embeds, attention_mask, position_ids, model_options)
        wanted = _wanted_positions(logits_to_keep, sum(shard.layout.query))
        require_same_inputs(self.mesh.sequence, logits_to_keep=wanted.numel(), logits=wanted)
        logits = shard.gather_selected(self.head(shard.select(output.last_hidden_state, wanted)), wanted)
        hidden = output.hidden_states
        if hidden is not None:
            hidden = _gather_all(hidden, shard, shard.gather_tokens(output.last_hidden_state))
        result = CausalLMOutputWithPast(logits=logits, hidden_states=hidden)
        return result if as_object else result.to_tuple()

    def _options(
        self, past_key_values: Any, use_cache: bool | None, options: dict[str, Any]
    ) -> tuple[dict[str, Any], bool]:
        """The options for the model's own code, and whether to return an object; refuses what would not be exact."""
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
    """The base model and the head; raises UnsupportedModelError as `parallelize` documents."""
    import transformers

    from omni_sp.llm.swiftkv import reference

    owners = [(transformers, name) for name in _MODELS] + [(reference, f"{name}SwiftKV") for name in reference.NAMES]
    bases = {getattr(owner, f"{name}Model") for owner, name in owners}
    heads = {getattr(owner, f"{name}ForCausalLM") for owner, name in owners}
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


def _gather_all(hidden: Sequence[Tensor | None], shard: SequenceShard, last: Tensor) -> tuple[Any, ...]:
    """Gather the hidden states of all layers; the last of them is the model's output, gathered already."""
    gathered = [None if state is None else shard.gather_tokens(state) for state in hidden[:-1]]
    return (*gathered, None if hidden[-1] is None else last)


def _wanted_positions(logits_to_keep: int | Tensor, tokens: int) -> Tensor:
    """The positions whose logits transformers would compute: the last ones (0: all), or those in a tensor."""
    if isinstance(logits_to_keep, Tensor):
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
