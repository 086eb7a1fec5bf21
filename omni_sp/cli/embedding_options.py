"""The options of ``omni-sp serve-embeddings``: those of `omni_sp.cli.options.SERVE` that fit, and its own."""

from __future__ import annotations

from omni_sp.cli.options import SERVE, SERVER, Option
from omni_sp.llm.embedding.settings import LEAST_LOADED, POLICIES

EMBEDDING = "embedding"
"""Owner of options that EmbeddingSettings takes."""
_MIB = 2**20
_LIKE_SERVE = (
    "--host", "--port", "--api-key-file", "--allow-origin", "--drain-timeout", "--log-level", "--log-format",
    "--ssl-certfile", "--ssl-keyfile",
)  # fmt: skip

# fmt: off
SERVE_EMBEDDINGS = (
    Option("model", "a folder or a hub id of an embedding model; it comes first", EMBEDDING, metavar="MODEL"),
    Option("--replicas", "servers of vLLM that run side by side, each with the whole model", EMBEDDING, type=int,
           default=2),
    Option("--gpus", "how many GPUs they share; 0 for the CPU. A GPU's memory is shared evenly by its replicas",
           EMBEDDING, type=int, metavar="G", otherwise="all that are visible"),
    Option("--policy", "which replica gets what: least-loaded goes by the tokens under way", EMBEDDING,
           default=LEAST_LOADED, choices=POLICIES),
    Option("--max-inputs", "texts that may be under way, over all requests; more are refused with status 429",
           EMBEDDING, type=int, default=16384),
    Option("--request-timeout", "seconds that a request may take", EMBEDDING, "request_timeout_s", type=float,
           default=600.0, metavar="S"),
    Option("--startup-timeout", "seconds that a replica may take to start", EMBEDDING, "startup_timeout_s", type=float,
           default=1800.0, metavar="S"),
    Option("--api-key", "let in only who has this key; repeatable",
           SERVER, "api_keys", action="append", metavar="KEY", otherwise="whoever reaches the port may use the model"),
    Option("--max-body-mib", "the most MiB of a request", SERVER, "max_body_bytes", unit=_MIB, type=int),
    *(option for option in SERVE if option.flags[0] in _LIKE_SERVE),
)
# fmt: on
