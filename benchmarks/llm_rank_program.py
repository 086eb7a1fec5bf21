"""One rank's program of a large language model on one device, at real size, under several ways to share the work.

python -m benchmarks.llm_rank_program --tokens 8192 32768 131072               # a prompt
python -m benchmarks.llm_rank_program --tokens 8192 --decode 1 16 64           # and a new token for so many requests
python -m benchmarks.llm_rank_program --model tiny --tokens 256 --decode 4 --no-save   # a test run, on any machine

Measured, on the device that the output names: the kernels of decoder layers that rank 0 runs, and the packing for its
exchanges. Counted: the bytes that it sends. Projected: everything that involves another rank. The others are absent (a
fake process group delivers nothing), so exchanges are added as bytes over a stated bandwidth, overlapped with nothing;
all-reduces count as a ring sends them. One layer's random weights are used for all layers: those of a whole model
("held") may exceed the device's memory. Left out: what runs once in a forward (embedding, last gather, vocabulary),
FP8, and kernels fused by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.interleaved import Timing, add_output_options, machine, report, save, take_turns
from omni_sp.attention.layout import head_shares, split_evenly
from omni_sp.attention.ulysses import GatherHeads, ScatterHeads, UlyssesLayout
from omni_sp.mesh import Axis


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int


MODELS = {
    "llama-70b": Model(8192, 28672, 64, 8, 128, 80),
    "tiny": Model(256, 512, 16, 8, 16, 2),
}


@dataclass(frozen=True)
class Way:
    """How ranks share the work: ``tensor`` x ``sequence`` ranks, as inside vLLM.

    ``is_shifted``: a step of few tokens under shift parallelism. Every rank has all tokens, and multiplies by views of
    the matrices that it holds for other steps.
    """

    tensor: int
    sequence: int
    is_shifted: bool = False

    @property
    def exchanges(self) -> bool:
        """Whether the ranks share the tokens, and trade them for heads around attention."""
        return self.sequence > 1 and not self.is_shifted

    @property
    def num_reducing(self) -> int:
        """Number of ranks that all-reduce their products."""
        return self.tensor * self.sequence if self.is_shifted else self.tensor


PREFILL = {"TP2": Way(2, 1), "TP8": Way(8, 1), "SP8": Way(1, 8), "T2 x S4": Way(2, 4)}
DECODE = {"TP8": Way(8, 1), "SP8": Way(1, 8), "shift": Way(1, 8, is_shifted=True)}


class Weights:
    """Random matrices of one decoder layer: the shard of rank 0 of ``tensor``."""

    def __init__(self, model: Model, tensor: int, **kind: Any) -> None:
        share = head_shares(model.heads, model.kv_heads, tensor)[0][0]
        self.heads, self.kv_heads = share.num_query, share.num_key
        self.inner = split_evenly(model.inner, tensor)[0]

        def draw(outputs: int, inputs: int) -> torch.Tensor:
            return torch.randn(outputs, inputs, **kind).mul_(inputs**-0.5)

        self.qkv = draw((self.heads + 2 * self.kv_heads) * model.head_dim, model.hidden)
        self.out = draw(model.hidden, self.heads * model.head_dim)
        self.gate_up = draw(2 * self.inner, model.hidden)
        self.down = draw(model.hidden, self.inner)
        self.norms = torch.ones(2, model.hidden, **kind)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        return sum(matrix.nbytes for matrix in (self.qkv, self.out, self.gate_up, self.down))


class Program:
    """What rank 0 computes and sends in a decoder layer, for one step.

    Args:
        model: the sizes.
        way: how ranks share the work.
        weights: this rank's weights.
        tokens: number of tokens of the step; one of each request in a decoding step.
        cache: None for a prompt; else keys and values (requests, tokens, kv heads of this rank, head_dim).
    """

    def __init__(
        self, model: Model, way: Way, weights: Weights, tokens: int, cache: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        self._model, self._way, self._weights, self._tokens, self._cache = model, way, weights, tokens, cache
        size = way.sequence
        heads = head_shares(weights.heads, weights.kv_heads, size)[0]
        lengths = split_evenly(max(tokens, size), size) if way.exchanges else (tokens,)
        self.reducing = Axis("tensor", tuple(range(0, way.num_reducing * size, size)), 0, None, {})
        self.trading = _trading_axis(size if way.exchanges else 1)
        self._layout = UlyssesLayout(self.trading, heads, lengths, lengths)
        # The heads that the matrices compute: all heads of this rank's weights, or only its own heads.
        computed = heads[0] if way.is_shifted else head_shares(weights.heads, weights.kv_heads, 1)[0][0]
        inner = split_evenly(weights.inner, size)[0] if way.is_shifted else weights.inner
        self._heads, self._kv_heads, width = computed.num_query, computed.num_key, model.head_dim
        held, used = (weights.heads, weights.kv_heads, weights.kv_heads), (self._heads, self._kv_heads, self._kv_heads)
        self._qkv = _first_rows(weights.qkv, [width * count for count in held], [width * count for count in used])
        self._gate_up = _first_rows(weights.gate_up, [weights.inner] * 2, [inner] * 2)
        self._out, self._down = weights.out[:, : self._heads * width], weights.down[:, :inner]
        self._received_tensors: dict[str, torch.Tensor] = {}
        kind: dict[str, Any] = {"dtype": weights.qkv.dtype, "device": weights.qkv.device}
        self.hidden = torch.randn(lengths[0], model.hidden, **kind)
        first = 0 if cache is None else cache[0].shape[1] - 1
        positions = torch.arange(lengths[0]) if cache is None else torch.full((lengths[0],), first)
        steps = 500000.0 ** (-torch.arange(0, model.head_dim, 2) / model.head_dim)
        angles = (positions[:, None] * steps).repeat(1, 2)[:, None]
        self._cos, self._sin = angles.cos().to(**kind), angles.sin().to(**kind)

    @property
    def read_bytes(self) -> int:
        """Bytes of the matrices that a step multiplies by."""
        return sum(matrix.nbytes for matrix in (*self._qkv, self._out, *self._gate_up, self._down))

    def run(self, num_layers: int) -> torch.Tensor:
        """Run ``num_layers`` layers, one after the other."""
        hidden = self.hidden
        for _ in range(num_layers):
            hidden = self._layer(hidden)
        return hidden

    def sent(self) -> tuple[int, int]:
        """Number of bytes that this rank sends in a layer, and of its collectives."""
        traffics = self.reducing.traffic, self.trading.traffic
        for traffic in traffics:
            traffic.reset()
        self.run(1)
        num_bytes = sum(sum(traffic.bytes.values()) for traffic in traffics)
        return num_bytes, sum(sum(traffic.calls.values()) for traffic in traffics)

    def _layer(self, hidden: torch.Tensor) -> torch.Tensor:
        qkv = _products(self._norm(hidden, 0), self._qkv).unflatten(-1, (-1, self._model.head_dim))
        query_key, value = qkv.split([self._heads + self._kv_heads, self._kv_heads], dim=1)
        query, key = self._rotate(query_key).split([self._heads, self._kv_heads], dim=1)
        attend = self._attend_with_exchange if self._way.exchanges else self._attend
        out = attend(query[None], key[None], value[None]).reshape(hidden.shape[0], -1)
        hidden = hidden + self._all_reduce(F.linear(out, self._out))
        gate, up = _products(self._norm(hidden, 1), self._gate_up).chunk(2, dim=-1)
        return hidden + self._all_reduce(F.linear(F.silu(gate) * up, self._down))

    def _norm(self, hidden: torch.Tensor, index: int) -> torch.Tensor:
        return F.rms_norm(hidden, (self._model.hidden,), self._weights.norms[index], 1e-5)

    def _rotate(self, heads: torch.Tensor) -> torch.Tensor:
        front, back = heads.chunk(2, dim=-1)
        return heads * self._cos + torch.cat((-back, front), dim=-1) * self._sin

    def _all_reduce(self, product: torch.Tensor) -> torch.Tensor:
        """Return the product, since the others' are absent, and count what a ring would send."""
        size = self.reducing.size
        if size > 1:
            self.reducing.traffic.add("all_reduce", 2 * (size - 1) * product.nbytes // size)
        return product

    def _attend_with_exchange(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scattered = ScatterHeads(query, key, value, None, self._layout).wait()[:3]
        received = [self._received(f"in {index}", tensor) for index, tensor in enumerate(scattered)]
        out = self._attend(*(tensor[:, : self._tokens] for tensor in received))
        padding = sum(self._layout.query) - self._tokens
        gathered = GatherHeads(F.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out, self._layout)
        result = torch.empty_like(query)
        gathered.write(result)
        return self._received("out", result)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend over (1, tokens, heads, head_dim): all tokens of a prompt, or one of each request."""
        if self._cache is None:
            return _attention(query, key, value, is_causal=True)
        keys, values = self._cache
        keys[:, -1], values[:, -1] = key[0], value[0]
        return _attention(query.transpose(0, 1), keys, values, is_causal=False).transpose(0, 1)

    def _received(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Random numbers in place of those that nobody sent, drawn once: fresh memory may be all zeros."""
        if name not in self._received_tensors:
            fresh = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
            self._received_tensors[name] = fresh.normal_()
        return self._received_tensors[name]


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool) -> torch.Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True).transpose(1, 2)


def _first_rows(matrix: torch.Tensor, held: list[int], used: list[int]) -> list[torch.Tensor]:
    """The used rows of each of some stacked matrices; one whole matrix where all rows are used."""
    if held == used:
        return [matrix]
    return [part[:count] for part, count in zip(matrix.split(held), used, strict=True)]


def _products(hidden: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
    """The products with all matrices, concatenated."""
    products = [F.linear(hidden, matrix) for matrix in matrices]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def _trading_axis(size: int) -> Axis:
    """Rank 0's axis of ranks that trade tokens for heads."""
    if size == 1:
        return Axis("ulysses", (0,), 0, None, {})
    group = dist.group.WORLD if size == dist.get_world_size() else dist.new_group(list(range(size)))
    assert group is not None
    return Axis.of_group(group)


@contextmanager
def absent_ranks(world_size: int) -> Iterator[None]:
    """A process group in which this process is rank 0 and the other ranks are absent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Setting:
    """Settings that all ways share.

    Attributes:
        model: the sizes.
        device: "cpu" or "cuda".
        dtype: of weights and activations.
        bandwidth: bytes a second that a rank sends.
        latency: seconds of a collective beyond its bytes over the bandwidth.
        num_layers: layers that run one after the other in every turn.
        rounds: turns of each way.
        graphs: run decoding steps as CUDA graphs, as engines do: launching their kernels takes longer than the kernels.
    """

    model: Model
    device: str
    dtype: torch.dtype
    bandwidth: float
    latency: float = 0.0
    num_layers: int = 1
    rounds: int = 10
    graphs: bool = False


@torch.no_grad()
def measure(setting: Setting, ways: dict[str, Way], tokens: int, batch: int = 0) -> dict[str, Timing]:
    """Seconds of a layer by every way, in turns; the facts hold counts and projections.

    Args:
        setting: what all ways share.
        ways: how ranks share the work, by name.
        tokens: number of tokens of a prompt, or of each request in the cache.
        batch: number of requests that get a new token each; 0 for a prompt.
    """
    model = setting.model
    kind: dict[str, Any] = {"dtype": setting.dtype, "device": setting.device}
    weights = {degree: Weights(model, degree, **kind) for degree in {way.tensor for way in ways.values()}}
    caches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    programs: dict[str, Program] = {}
    for name, way in ways.items():
        held = weights[way.tensor]
        cache = None
        if batch:
            count = head_shares(held.heads, held.kv_heads, way.sequence)[0][0].num_key
            shape = batch, tokens, count, model.head_dim
            cache = caches.setdefault(count, (torch.randn(shape, **kind), torch.randn(shape, **kind)))
        programs[name] = Program(model, way, held, batch or tokens, cache)
    sent = {name: program.sent() for name, program in programs.items()}
    contenders = {
        name: _contender(program, setting.num_layers, captured=setting.graphs and batch > 0)
        for name, program in programs.items()
    }
    timings = {}
    for name, seconds in take_turns(contenders, setting.rounds).items():
        timing = Timing([second / setting.num_layers for second in seconds])
        num_bytes, calls = sent[name]
        exchange = num_bytes / setting.bandwidth + calls * setting.latency
        timing.facts = {
            "sent_bytes": num_bytes,
            "collectives": calls,
            "held_bytes": weights[ways[name].tensor].nbytes,
            "read_bytes": programs[name].read_bytes,
            "projected_exchange_s": exchange,
            "projected_whole_s": model.layers * (timing.median + exchange),
        }
        timings[name] = timing
    return timings


def _contender(program: Program, num_layers: int, *, captured: bool) -> Callable[[], object]:
    def run() -> torch.Tensor:
        return program.run(num_layers)

    if not captured:
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def table(setting: Setting, timings: dict[str, Timing], tokens: int, batch: int = 0) -> str:
    """A table with a line for each way."""
    layers = setting.model.layers
    step = f"{batch} requests of {tokens} tokens, a new token each" if batch else f"a prompt of {tokens} tokens"
    lines = [
        f"{step}; a rank, a layer:",
        f"{'':8}{'held GiB':>9}{'read MiB':>9}{'compute ms':>11}{'sent MiB':>10}{'exchange ms':>12}"
        f"{f'{layers} layers s':>13}" + "".join(f"{f'{base} / it':>10}" for base in ("TP2", "TP8") if base in timings),
        f"{'':8}{'(all)':>9}{'':9}{'measured':>11}{'counted':>10}{'projected':>12}{'projected':>13}",
    ]
    for name, timing in timings.items():
        facts = timing.facts
        ratios = [
            timings[base].facts["projected_whole_s"] / facts["projected_whole_s"]
            for base in ("TP2", "TP8")
            if base in timings
        ]
        lines.append(
            f"{name:8}{facts['held_bytes'] * layers / 2**30:>9.3g}{facts['read_bytes'] / 2**20:>9.1f}"
            f"{timing.median * 1e3:>11.3f}{facts['sent_bytes'] / 2**20:>10.3f}"
            f"{facts['projected_exchange_s'] * 1e3:>12.4f}{facts['projected_whole_s']:>13.4f}"
            + "".join(f"{ratio:>10.2f}" for ratio in ratios)
        )
    return "\n".join(lines)


def _kernel(name: str, device: str) -> AbstractContextManager[None]:
    """Exactly this kernel on CUDA: the one that torch falls back on keeps every score of the prompt."""
    if device == "cpu":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel: AbstractContextManager[None] = sdpa_kernel(
        {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[name]
    )
    return kernel


def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-70b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768], help="of a prompt, or of a cache")
    parser.add_argument("--decode", type=int, nargs="+", default=[], metavar="BATCH", help="requests of a step")
    parser.add_argument("--bandwidth-gb-s", type=float, default=450.0, help="of a rank, one way (NVLink 4: 450)")
    parser.add_argument("--latency-us", type=float, default=0.0, help="of a collective, beyond its bytes")
    parser.add_argument("--layers", type=int, default=4, help="in a row, in every turn")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="bfloat16 on CUDA, else float32")
    parser.add_argument("--sdpa", choices=("flash", "cudnn"), default="flash", help="torch's attention on CUDA")
    parser.add_argument("--no-graphs", action="store_true", help="on CUDA, launch the kernels of decoding one by one")
    add_output_options(parser)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    if min([*options.tokens, *options.decode, options.layers, options.rounds, options.bandwidth_gb_s]) <= 0:
        parser.error("--tokens, --decode, --layers, --rounds and --bandwidth-gb-s are greater than 0")
    if device == "cuda" and options.dtype == "float32":
        parser.error("on CUDA, torch's flash and cudnn attention take 16-bit numbers: --dtype bfloat16 or float16")
    setting = Setting(
        MODELS[options.model], device, getattr(torch, options.dtype), options.bandwidth_gb_s * 1e9,
        options.latency_us * 1e-6, options.layers, options.rounds, graphs=device == "cuda" and not options.no_graphs,
    )  # fmt: skip
    print(f"{options.model}, {options.dtype}: rank 0 alone on {machine()['device']}, nothing is exchanged; projected:")
    print(f"bytes at {options.bandwidth_gb_s:g} GB/s + {options.latency_us:g} us a collective, hidden behind nothing")
    timings: dict[str, Timing] = {}
    with absent_ranks(8), _kernel(options.sdpa, device):
        for tokens in options.tokens:
            for batch in [0, *options.decode]:
                found = measure(setting, DECODE if batch else PREFILL, tokens, batch)
                print(table(setting, found, tokens, batch), flush=True)
                step = f"decode {batch} x {tokens}" if batch else f"prompt {tokens}"
                timings |= {f"{step}, {name}": timing for name, timing in found.items()}
    report(save(options.output, f"llm-rank-program-{options.model}", vars(options), timings))


if __name__ == "__main__":
    main()
