"""Whole pipelines whose encoders run on one rank each: the embeddings of one process, bit for bit, and who ran what."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_sp import DiffusionParallelConfig, ParallelMesh, parallelize
from omni_sp.errors import ConfigError, ShardingError
from omni_sp.pipelines.lazy_components import has_unread_weights
from omni_sp.pipelines.load import load_pipeline, resolve_model
from omni_sp.pipelines.shared_encoders import encoder_names, runs_encoder
from omni_sp.sharding.lazy import full_tensors
from omni_sp.testing.models import MODELS
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import relative_error
from tests.pipelines.zoo.all import ENTRIES
from tests.pipelines.zoo.check import build, draw, tensors
from tests.thorough import THOROUGH

SMALL = {"height": 32, "width": 48, "num_inference_steps": 2}
GUIDED = {"prompt": "a red cat in snow", "negative_prompt": "the blue star"}
CALLS: dict[str, dict[str, Any]] = {
    "sd3": {**SMALL, **GUIDED, "max_sequence_length": 12},
    "flux": {**SMALL, **GUIDED, "true_cfg_scale": 2.0, "max_sequence_length": 12},
    "qwen-image": {**SMALL, **GUIDED, "true_cfg_scale": 2.0},
    "z-image": {**SMALL, **GUIDED, "max_sequence_length": 12},
    "ltx": {**SMALL, **GUIDED, "width": 64, "num_frames": 9, "max_sequence_length": 12},
    "wan": {**SMALL, **GUIDED, "num_frames": 5, "max_sequence_length": 12},
}
SOME = [("sd3", 1, 2, 2), ("qwen-image", 1, 1, 2), ("z-image", 2, 1, 1)]
LAYOUTS = [(2, 1, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2)]
TRIED = [(name, *layout) for name in CALLS for layout in LAYOUTS] if THOROUGH else SOME


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models as they are saved, made when they are needed."""

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = tmp_path_factory.mktemp(name)
            MODELS[name][1](self[name])
            return self[name]

    return Folders()


def loaded(mesh: ParallelMesh, folder: Path) -> Any:
    """The pipeline, as a rank of Omni reads it."""
    encodes = partial(runs_encoder, mesh.config, mesh.rank)
    pipe = load_pipeline(resolve_model(folder), encodes=encodes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, call: dict[str, Any]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the encoders give in a call of the pipeline, and what it draws."""
    embeddings: list[torch.Tensor] = []
    original = pipe.encode_prompt

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        embeddings.append(output)
        return output

    pipe.encode_prompt = encode_prompt
    try:
        result = pipe(**call, output_type="latent", return_dict=False, generator=torch.Generator().manual_seed(3))
    finally:
        del pipe.encode_prompt
    return _leaves(full_tensors(embeddings, "a test")), tensors(result)


def _leaves(tree: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


def draw_shared(mesh: ParallelMesh, name: str, folder: Path) -> dict[str, Any]:
    """Draw twice over the ranks, while the shapes are new and when they are known, and again after remove()."""
    whole, pipe, call = load_pipeline(resolve_model(folder)), loaded(mesh, folder), CALLS[name]
    whole.set_progress_bar_config(disable=True)
    embeddings, result = drawn(whole, call)
    handle = parallelize(pipe, mesh)
    found: dict[str, Any] = {"equal": [], "errors": [], "ranks": []}
    for _ in range(2):
        handle.reset_counts()
        own, drawn_here = drawn(pipe, call)
        found["equal"].append(len(own) == len(embeddings) and all(map(torch.equal, own, embeddings)))
        found["errors"].append(relative_error(drawn_here, result))
        found["ranks"].append({name: sorted(ranks) for name, ranks in handle.encoders.ranks.items()})
    found["reasons"] = dict(handle.encoders.reasons)
    found["bytes"] = handle.encoders.weight_bytes
    found["unread"] = [name for name, part in pipe.components.items() if has_unread_weights(part)]
    handle.remove()
    own, drawn_here = drawn(pipe, call)
    found["restored"] = torch.equal(drawn_here, result) and not any(
        vars(part).get("_compiled_call_impl") is not None or "generate" in vars(part)
        for part in pipe.components.values()
        if isinstance(part, torch.nn.Module)
    )
    return found


@pytest.mark.parametrize(("name", "ulysses", "ring", "cfg"), TRIED)
def test_embeddings_are_those_of_one_process(
    ranks: RankPool, folders: dict[str, Path], name: str, ulysses: int, ring: int, cfg: int
) -> None:
    answers = ranks.run(draw_shared, name, folders[name], ulysses=ulysses, ring=ring, cfg=cfg, vae_parallel=False)
    world, group = ulysses * ring * cfg, ulysses * ring
    for rank, found in enumerate(answers):
        assert found["equal"] == [True, True]
        assert max(found["errors"]) <= 1e-5
        assert found["restored"]
        names = sorted(found["bytes"])
        turns = [{(index + turn * group) % world for turn in range(cfg)} for index in range(len(names))]
        # Once the shapes are known, the positive and the negative prompt are encoded at the same time.
        assert found["ranks"][1] == {name: sorted(of_one) for name, of_one in zip(names, turns, strict=True)}
        for name, runs in zip(names, turns, strict=True):
            assert (found["bytes"][name] > 0) == (rank in runs)
            assert (name in found["unread"]) == (rank not in runs)


def call_of(pipe: Any, **changes: Any) -> torch.Tensor:
    return drawn(pipe, {**CALLS["sd3"], "num_inference_steps": 1, **changes})[1]


def failing(mesh: ParallelMesh, folder: Path) -> list[str]:
    """An encoder fails on its rank, when the shapes are new and when they are known; the next call is right."""
    pipe = loaded(mesh, folder)
    handle = parallelize(pipe, mesh)
    model = type(pipe.text_encoder_2)
    plain, texts = model.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"no memory on rank {mesh.rank}")

    wanted = call_of(load_pipeline(resolve_model(folder)))
    for attempt in range(2):
        model.forward = forward
        try:
            call_of(pipe)
        except Exception as error:
            texts += [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
        finally:
            model.forward = plain
            handle.drop()
        texts.append(f"then {relative_error(call_of(pipe), wanted) <= 1e-5}, {attempt}")
    handle.remove()
    return texts


def test_an_error_of_an_encoder_is_raised_by_all_ranks(ranks: RankPool, folders: dict[str, Path]) -> None:
    answers = ranks.run(failing, folders["sd3"], ulysses=2, vae_parallel=False)
    assert answers[0] == answers[1]
    assert [text for text in answers[0] if text.startswith("then")] == ["then True, 0", "then True, 1"]
    assert answers[0].count("ValueError: no memory on rank 1") == 2


def differing(mesh: ParallelMesh, folder: Path) -> list[str]:
    """The ranks have other prompts; then one of them alone encodes a prompt, outside of the pipeline's call."""
    pipe = loaded(mesh, folder)
    handle = parallelize(pipe, mesh)
    texts = []
    for words in ("a red cat in snow", "a cat"), ("a red cat", "a red cat"):
        with pytest.raises(ShardingError) as error:
            call_of(
                pipe, prompt=words[mesh.rank], negative_prompt=None if len(set(words)) > 1 else words[0] * mesh.rank
            )
        texts.append(str(error.value))
        handle.drop()
    call_of(pipe)
    with torch.autocast("cpu", enabled=mesh.rank == 1), pytest.raises(ShardingError) as error:
        call_of(pipe)
    texts.append(str(error.value))
    handle.drop()
    if mesh.rank == 0:
        texts.append(str(drawn_alone(pipe).shape))
    handle.remove()
    return texts


def drawn_alone(pipe: Any) -> torch.Tensor:
    with torch.no_grad():
        embeddings: torch.Tensor = pipe.encode_prompt("a cat", None, None, max_sequence_length=12)[0]
        return embeddings


def test_ranks_with_other_prompts_are_found_and_one_rank_may_encode_alone(
    ranks: RankPool, folders: dict[str, Path]
) -> None:
    answers = ranks.run(differing, folders["sd3"], ulysses=2, vae_parallel=False)
    for texts in answers:
        assert all(text.startswith("the ranks call text_encoder") and "different inputs" in text for text in texts[:3])
    assert [len(texts) for texts in answers] == [4, 3]


def outside(mesh: ParallelMesh, folder: Path) -> dict[str, Any]:
    """Calls that people make themselves, of a language model, with text_encoder_parallel=True."""
    from transformers import DynamicCache

    whole, pipe = load_pipeline(resolve_model(folder)).text_encoder, loaded(mesh, folder)
    handle = parallelize(pipe, mesh)
    encoder, ids = pipe.text_encoder, torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 3, "do_sample": True, "pad_token_id": 0}
    found: dict[str, Any] = {}
    with torch.no_grad():
        torch.manual_seed(3)
        wanted = whole.generate(ids, **options), torch.rand(2)
        torch.manual_seed(3)
        found["generated"] = torch.equal(encoder.generate(ids, **options), wanted[0])
        found["random numbers"] = torch.equal(torch.rand(2), wanted[1])
        outputs = [model(ids, use_cache=True, output_hidden_states=True) for model in (whole, encoder)]
        found["logits"] = torch.equal(outputs[0].logits, outputs[1].logits)
        found["plain"] = type(outputs[1].hidden_states[-1]) is torch.Tensor
        with torch.autocast("cpu", dtype=torch.bfloat16):
            halves = [model(ids, output_hidden_states=True).hidden_states[-1] for model in (whole, encoder)]
        found["autocast"] = torch.equal(*halves)
        found["ran on"] = sorted(handle.encoders.ranks["text_encoder"])
        found["is unread"] = has_unread_weights(encoder)
        with pytest.raises(ShardingError, match=r"past_key_values were used.*text_encoder_parallel=False"):
            outputs[1].past_key_values.get_seq_length()
        # Whoever looks on sees every call on every rank, though one has not read what it looks at.
        seen: list[Any] = []
        hook = encoder.register_forward_hook(lambda *given: seen.append(given))
        encoder(ids, output_hidden_states=True)
        encoder(ids[:, :3])
        found["hook"] = len(seen), handle.encoders.reasons["text_encoder"]
        hook.remove()
        # A cache among the arguments would be written to.
        handle.reset_counts()
        again = [model(ids, past_key_values=DynamicCache(config=whole.config)).logits for model in (whole, encoder)]
        found["with a cache"] = torch.equal(*again), handle.encoders.reasons["text_encoder"]
    found["gradient"] = encoder(ids).logits.requires_grad
    with torch.set_grad_enabled(mesh.rank == 1):
        found["gradient of one"] = encoder(ids).logits.requires_grad, handle.encoders.reasons["text_encoder"]
    handle.remove()
    return found


def test_calls_outside_of_the_pipeline(ranks: RankPool, folders: dict[str, Path]) -> None:
    answers = ranks.run(outside, folders["qwen-image"], ulysses=2, vae_parallel=False, text_encoder_parallel=True)
    for rank, found in enumerate(answers):
        same = ("generated", "random numbers", "logits", "plain", "autocast", "gradient")
        assert {name: found[name] for name in same} == dict.fromkeys(same, True)
        assert found["ran on"] == [0]
        assert found["is unread"] == (rank == 1)
        assert found["with a cache"] == (True, "a call gets an object that it may write to, DynamicCache")
        assert found["hook"] == (2, "code of others runs around it")
        assert found["gradient of one"] == (rank == 1, "gradients are enabled (torch.no_grad() ends that)")


def watched_by_one(mesh: ParallelMesh, folder: Path) -> dict[str, Any]:
    """One rank alone hooks an encoder between two pictures, and then between two encoders of a picture."""
    pipe, seen, hooks = loaded(mesh, folder), [], []
    wanted = call_of(load_pipeline(resolve_model(folder)))
    handle = parallelize(pipe, mesh)

    def watch() -> None:
        if mesh.rank == 1:
            hooks.append(pipe.text_encoder_2.register_forward_hook(lambda *given: seen.append(given)))

    def drawn_right() -> tuple[bool, dict[str, str]]:
        handle.reset_counts()
        return relative_error(call_of(pipe), wanted) <= 1e-5, dict(handle.encoders.reasons)

    def then_watch(*args: Any, **kwargs: Any) -> Any:
        embeddings = type(pipe)._get_clip_prompt_embeds(pipe, *args, **kwargs)
        watch()
        return embeddings

    found: dict[str, Any] = {"drawn": [drawn_right()]}
    watch()
    found["drawn"].append(drawn_right())
    found["seen"] = len(seen)
    for hook in hooks:
        hook.remove()
    found["drawn"].append(drawn_right())
    pipe._get_clip_prompt_embeds = then_watch
    with pytest.raises(ShardingError) as error:
        call_of(pipe)
    found["late"] = str(error.value)
    del pipe._get_clip_prompt_embeds
    handle.drop()
    for hook in hooks:
        hook.remove()
    found["drawn"].append(drawn_right())
    handle.remove()
    return found


def test_a_hook_on_one_rank_alone(ranks: RankPool, folders: dict[str, Path]) -> None:
    for rank, found in enumerate(ranks.run(watched_by_one, folders["sd3"], ulysses=2, vae_parallel=False)):
        watched = {"text_encoder_2": "code of others runs around it"}
        assert found["drawn"] == [(True, {}), (True, watched), (True, {}), (True, {})]
        assert found["seen"] == 2 * rank
        assert found["late"].startswith(
            "text_encoder_2 changed between two calls of encoders on rank 1: code of others"
        )


def with_callback_and_adapter(mesh: ParallelMesh, folder: Path) -> dict[str, Any]:
    """A callback reads embeddings on rank 0 alone; an adapter is put on an encoder that a rank has not read."""
    from peft import LoraConfig

    whole, pipe = load_pipeline(resolve_model(folder)), loaded(mesh, folder)
    handle, seen = parallelize(pipe, mesh), []

    def callback(_pipe: Any, _step: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if mesh.rank == 0:
            seen.append(float(given["prompt_embeds"].abs().sum()))
        return {}

    watched = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    found: dict[str, Any] = {"callback": relative_error(call_of(pipe, **watched), call_of(whole))}
    found["seen"] = len(seen)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    for one in (whole, pipe):
        torch.manual_seed(5)
        one.text_encoder.add_adapter(config, "style")
    before = call_of(load_pipeline(resolve_model(folder)))
    found["adapter"] = relative_error(call_of(pipe), call_of(whole)), relative_error(call_of(pipe), before) > 1e-3
    found["ran on"] = sorted(handle.encoders.ranks["text_encoder"])
    handle.remove()
    return found


def test_callbacks_and_adapters(ranks: RankPool, folders: dict[str, Path]) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install '.[lora]'")
    answers = ranks.run(with_callback_and_adapter, folders["sd3"], ring=2, vae_parallel=False)
    for rank, found in enumerate(answers):
        assert found["callback"] <= 1e-5
        assert found["seen"] == (rank == 0)
        assert found["adapter"][0] <= 1e-5
        assert found["adapter"][1]
        assert found["ran on"] == [0]


def with_encoders_changed(mesh: ParallelMesh, folder: Path) -> list[float]:
    """Errors in another dtype, and with a layer less in an encoder, each after the shapes of results were known."""
    whole, pipe = load_pipeline(resolve_model(folder)), loaded(mesh, folder)
    handle, errors = parallelize(pipe, mesh), []
    call_of(pipe)
    for one in (whole, pipe):
        one.to(torch.float64)
    errors.append(relative_error(call_of(pipe), call_of(whole)))
    for one in (whole, pipe):
        one.to(torch.float32)
        layers = next(part for part in one.text_encoder.modules() if isinstance(part, torch.nn.ModuleList))
        del layers[0]  # the hidden states are one less
    errors += [relative_error(call_of(pipe), call_of(whole)) for _ in range(2)]
    assert handle.encoders.reasons == {}
    handle.remove()
    return errors


def test_encoders_that_change_between_calls(ranks: RankPool, folders: dict[str, Path]) -> None:
    for errors in ranks.run(with_encoders_changed, folders["sd3"], ulysses=2, vae_parallel=False):
        assert max(errors) <= 1e-5


def draw_entry(mesh: ParallelMesh, name: str) -> tuple[bool, dict[str, set[int]], dict[str, str]]:
    """Whether an entry of the zoo draws the bits that it draws with its encoders on every rank, and who ran them."""
    pipe, entry = build(name, torch.float32), ENTRIES[name]
    handle = parallelize(pipe, mesh)
    drawn_shared = [draw(pipe, entry.arguments()) for _ in range(2)]
    ranks, reasons = dict(handle.encoders.ranks), dict(handle.encoders.reasons)
    handle.encoders.remove()
    wanted = draw(pipe, entry.arguments())
    handle.remove()
    first, second = drawn_shared
    # With guidance in groups, a first call of new shapes is computed whole, and kernels round its rows otherwise.
    is_same = torch.equal(first, wanted) if mesh.cfg.size == 1 else relative_error(first, wanted) <= 1e-4
    return is_same and torch.equal(second, wanted), ranks, reasons


ENCODING = [
    name
    for name in (
        "WanImageToVideoPipeline, CLIP",
        "AceStepPipeline",
        "FluxPipeline, two pictures of each of two prompts",
        "HunyuanVideo15ImageToVideoPipeline",
        "StableDiffusion3Pipeline, words, two pictures each",
        "WanImageToVideoPipeline, first and last picture",
    )
    if ENTRIES[name].runs_here
]
"""The entries of the zoo that encode; the others get embeddings."""


@pytest.mark.parametrize("cfg", [1, 2] if THOROUGH else [1])
@pytest.mark.parametrize("name", ENCODING if THOROUGH else ENCODING[:2])
def test_pipelines_of_the_zoo_share_their_encoders(ranks: RankPool, name: str, cfg: int) -> None:
    for is_same, ran, reasons in ranks.run(draw_entry, name, ulysses=2, cfg=cfg, vae_parallel=False):
        assert is_same
        assert not reasons
        assert ran
        assert all(len(of_one) <= cfg for of_one in ran.values())


def test_encoders_have_an_order() -> None:
    assert encoder_names(["vae", "text_encoder_2", "transformer", "image_encoder", "text_encoder"]) == [
        "image_encoder",
        "text_encoder",
        "text_encoder_2",
    ]
    assert encoder_names(["safety_checker", "text_encoder_offload", "scheduler", "tokenizer"]) == []
    two = DiffusionParallelConfig(ulysses_degree=2)
    assert [runs_encoder(two, 1, index) for index in range(3)] == [False, True, False]
    assert runs_encoder(DiffusionParallelConfig(ulysses_degree=2, text_encoder_parallel=False), 1, 0)
    for value in ("yes", 1, None):
        with pytest.raises(ConfigError, match=r'text_encoder_parallel=.*: give True, False or "auto"'):
            DiffusionParallelConfig(text_encoder_parallel=value)  # type: ignore[arg-type]
