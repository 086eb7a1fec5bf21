"""The degrees of a vLLM engine, how they lie in vLLM's configuration, and what does not run beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from omni_sp.errors import ConfigError
from omni_sp.llm.speculation.settings import SpeculationSettings
from omni_sp.validation import require_bool, require_int

_SPECULATION_WITHOUT_A_MODEL = ("ngram", "ngram_gpu", "suffix")
# By --quantization, and "online", which is what vLLM makes of those that quantise as they load.
_QUANTISED_PARTS = ("fp8", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "online")
CONFIG_KEY = "omni_sp"
"""The key of the settings in vLLM's ``additional_config``, which every process of vLLM gets."""


@dataclass(frozen=True)
class LlmParallelConfig:
    """Degrees of an LLM engine.

    Attributes:
        sequence_parallel_size: ranks that trade tokens for heads around attention (Ulysses).
        tensor_parallel_size: ranks among which each of those splits its weights. vLLM runs the product of the two.
        enable_shift_parallel: steps with few tokens use the same weights by tensor parallelism over all ranks.
        shift_parallel_threshold: the most tokens of such a step. None: measured at the first step, each way in turns.
        step_counts_file: where rank 0 counts the steps.
        speculation: ours; None: none, or vLLM's own speculation.
        swiftkv: the model is a SwiftKV model; set when vLLM has read its configuration.
    """

    sequence_parallel_size: int = 1
    tensor_parallel_size: int = 1
    enable_shift_parallel: bool = False
    shift_parallel_threshold: int | None = None
    step_counts_file: str | None = None
    speculation: SpeculationSettings | None = None
    swiftkv: bool = False

    def __post_init__(self) -> None:
        for name in ("sequence_parallel_size", "tensor_parallel_size"):
            require_int(name, getattr(self, name), minimum=1, error=ConfigError, hint="give a whole number from 1 on")
        require_bool("enable_shift_parallel", self.enable_shift_parallel, error=ConfigError)
        threshold = self.shift_parallel_threshold
        if threshold is not None:
            hint = "give a number of tokens from 0 on, or leave it to be measured"
            require_int("shift_parallel_threshold", threshold, minimum=0, error=ConfigError, hint=hint)
        if threshold is not None and not self.enable_shift_parallel:
            raise ConfigError(
                f"shift_parallel_threshold={threshold} means nothing without shift parallelism: add "
                "--enable-shift-parallel (in Python enable_shift_parallel=True)"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks, which is vLLM's tensor parallel size."""
        return self.sequence_parallel_size * self.tensor_parallel_size

    @property
    def is_sharded(self) -> bool:
        """Whether ranks share the tokens of a step; else the model is vLLM's own."""
        return self.sequence_parallel_size > 1

    @property
    def is_enabled(self) -> bool:
        """False where vLLM runs as it does without us."""
        return self.is_sharded or self.speculation is not None or self.swiftkv

    @property
    def keeps_states(self) -> bool:
        """Whether the model keeps its hidden states of a step: a trained speculator drafts from them."""
        return self.speculation is not None and self.speculation.head is not None

    @property
    def prefers_eager(self) -> bool:
        """Whether steps run eagerly unless somebody asks otherwise."""
        return self.is_sharded or self.keeps_states

    def reason_for_eager(self, *, on_cpu: bool) -> str | None:
        """Why vLLM must not compile the model; None where it may.

        Args:
            on_cpu: vLLM runs on a CPU, where it has no CUDA graphs.
        """
        if self.swiftkv:
            return "a SwiftKV model chooses in each step which tokens its late layers see, which cannot be compiled"
        if self.enable_shift_parallel:
            return "shift parallelism runs a step by one of two programs, and vLLM would compile the first it sees"
        if not on_cpu and (self.is_sharded or self.keeps_states):
            # In a CUDA graph of a step none of our Python runs: the sizes of one step would be used for all.
            return "on GPUs a CUDA graph would leave out what our flags do between kernels: steps run eagerly there"
        return None

    def additional_config(self, user_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The ``additional_config`` for vLLM: these settings beside the user's own entries."""
        if user_config is not None and not isinstance(user_config, Mapping):
            raise ConfigError(f"additional_config is a {type(user_config).__name__}, and ours is added: give a dict")
        merged = dict(user_config or {})
        if CONFIG_KEY in merged:
            raise ConfigError(f"additional_config already holds {CONFIG_KEY!r}: give the degrees in one place")
        return merged | {CONFIG_KEY: asdict(self)}

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> LlmParallelConfig | None:
        """The settings in a vLLM ``additional_config``; None where there are none, or vLLM runs as without us."""
        entry = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        if entry is None:
            return None
        try:
            speculation = entry.get("speculation")
            if speculation is not None:
                entry = entry | {"speculation": SpeculationSettings(**speculation)}
            settings = cls(**entry)
        except TypeError as error:
            raise ConfigError(f"additional_config[{CONFIG_KEY!r}]={entry!r}: {error}") from error
        return settings if settings.is_enabled else None


@dataclass(frozen=True)
class EngineFeatures:
    """The other features that an engine uses, as far as they are known, by vLLM's names.

    The main process reads them from flags and the model's configuration. Every rank reads them again from vLLM's own
    configuration, where a feature may have been enabled in another way.
    """

    enable_lora: bool = False
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    quantization: str | None = None
    speculation: str | None = None
    has_mrope: bool = False
    has_dual_chunks: bool = False
    attention_heads: int | None = None
    runner: str | None = None
    decode_context_parallel_size: int | None = None
    prefill_context_parallel_size: int | None = None
    enable_dbo: bool | None = None

    def require_supported(self, settings: LlmParallelConfig, *, what: str = "sequence parallelism") -> None:
        """Raise ConfigError for a feature with which results would be wrong, or silently not parallel.

        ``what``: does not run with it.
        """
        if self.enable_lora:
            raise ConfigError(
                f"{what} does not run with LoRA (--enable-lora): merge the adapter into the weights, or leave it"
            )
        if self.pipeline_parallel_size > 1:
            raise ConfigError(
                f"{what} does not run with pipeline parallelism: leave --pipeline-parallel-size "
                f"{self.pipeline_parallel_size}, and give those ranks to tensor parallelism, or to our flags"
            )
        if self.data_parallel_size > 1:
            raise ConfigError(
                f"{what} does not run with data parallelism: leave --data-parallel-size "
                f"{self.data_parallel_size}, and start one server for each replica"
            )
        uses_parts = settings.is_sharded and (settings.enable_shift_parallel or settings.tensor_parallel_size > 1)
        if uses_parts and self.quantization is not None and self.quantization not in _QUANTISED_PARTS:
            raise ConfigError(
                f"weights quantised by {self.quantization!r} have no plain parts to share with tensor parallelism: "
                "leave shift parallelism and inner tensor parallelism, or quantise the plain model with --quantization "
                "fp8_per_channel"
            )
        if self.has_mrope:
            raise ConfigError(
                "models with multimodal rotary embeddings (mrope) are not handled: use tensor parallelism alone"
            )
        if self.has_dual_chunks:
            # Its rotary embedding gives five queries a head, for chunks of which no other attention knows.
            raise ConfigError(
                f"{what} does not run with dual chunk attention (dual_chunk_attention_config in config.json): use "
                "tensor parallelism alone, or a model without it"
            )
        is_ours = settings.speculation is not None and self.speculation == "custom_class"
        if self.speculation is not None and not is_ours and self.speculation not in _SPECULATION_WITHOUT_A_MODEL:
            raise ConfigError(
                f"speculation by {self.speculation!r} runs a model of its own, which is not handled: use a speculator "
                "(method 'arctic'), n-gram speculation or suffix decoding, or none"
            )
        if self.attention_heads is not None and self.attention_heads % settings.world_size:
            raise ConfigError(
                f"{self.attention_heads} attention heads are not divisible by {settings.world_size} ranks, which vLLM "
                "needs: choose degrees whose product divides them"
            )
        if self.runner not in (None, "auto", "generate"):
            raise ConfigError(f"{what} inside vLLM generates text, and this runs for {self.runner!r}")
        for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
            if (getattr(self, name) or 1) > 1:
                raise ConfigError(f"{what} does not run with vLLM's context parallelism: leave {name}")
        if self.enable_dbo:
            raise ConfigError(f"{what} does not run with microbatches: leave --enable-dbo and --ubatch-size")
