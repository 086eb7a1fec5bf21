"""One request on one pipeline: nothing is dropped, and the result is the plain pipeline's."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omni_sp import ConfigError, OmniDiffusionSamplingParams, SamplingParamsError, UnsupportedModelError
from omni_sp.pipelines.arguments import (
    Prompt,
    call_arguments,
    frames_per_second,
    rounded_size,
    small_arguments,
    warm_up_arguments,
)
from omni_sp.pipelines.capabilities import PipelineCapabilities, inspect_pipeline
from omni_sp.pipelines.load import load_pipeline, resolve_model
from omni_sp.pipelines.results import CallResult, output_deviation, result_of
from omni_sp.pipelines.run import run_call
from omni_sp.pipelines.shapes import SHAPES_MODEL
from omni_sp.testing.models import save_flux_kontext, save_sd3, save_wan, save_wan_i2v

IMAGE = PipelineCapabilities(
    name="ImagePipeline",
    parameters={
        "prompt": None, "negative_prompt": None, "true_cfg_scale": 4.0, "height": None, "width": None,
        "num_inference_steps": 50, "num_images_per_prompt": 1, "generator": None, "output_type": "pil",
        "guidance_scale": None, "max_sequence_length": 512, "sigmas": None,
    },
    vae_multiple=8,
    height_multiple=16,
    width_multiple=32,
)  # fmt: skip
VIDEO = PipelineCapabilities(
    name="VideoPipeline",
    parameters={"prompt": None, "num_frames": 81, "num_videos_per_prompt": 1, "guidance_scale": 5.0, "generator": None},
    makes_videos=True,
    frames_multiple=4,
)
CAT = Prompt(text="a cat")


def params(**values: Any) -> OmniDiffusionSamplingParams:
    return OmniDiffusionSamplingParams(**values)


def refusal(capabilities: PipelineCapabilities, prompt: Prompt = CAT, **values: Any) -> str:
    with pytest.raises(SamplingParamsError) as caught:
        call_arguments(capabilities, prompt, params(**values))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("num_frames", {"num_frames": 5}),
        ("height", {"height": 1001}),
        ("width", {"width": 16}),
        ("width", {"width": 64, "extra_args": {"width": 32}}),
        ("true_cfg_scale", {"negative_prompt": "a dog", "true_cfg_scale": 1.0}),
        ("strength", {"extra_args": {"strength": 0.5}}),
        ("num_outputs_per_prompt", {"num_outputs_per_prompt": 2, "extra_args": {"num_images_per_prompt": 2}}),
        ("seed", {"seed": 1}),
        ("fps", {}),
        ("image", {}),
    ],
)
def test_an_error_carries_the_parameter_that_is_to_blame(param: str, values: dict[str, Any]) -> None:
    taken = dict(IMAGE.parameters) | {"image": None, "frame_rate": None}
    taken.pop("generator")
    required = {"fps": ("frame_rate",), "image": ("image",)}.get(param, ())
    capabilities = PipelineCapabilities(
        name="Pipe", parameters=taken, required=required, needs_image=param == "image", vae_multiple=8,
        height_multiple=16, width_multiple=32,
    )  # fmt: skip
    with pytest.raises(SamplingParamsError) as caught:
        call_arguments(capabilities, CAT, params(**values))
    assert caught.value.param == param


def test_names_are_those_of_the_pipeline() -> None:
    arguments = call_arguments(
        IMAGE,
        Prompt(text="a cat", negative_text="a dog"),
        params(height=16, width=64, num_inference_steps=3, num_outputs_per_prompt=2, max_sequence_length=9, seed=1),
    )
    assert arguments == {
        "prompt": "a cat", "negative_prompt": "a dog", "height": 16, "width": 64, "num_inference_steps": 3,
        "num_images_per_prompt": 2, "max_sequence_length": 9, "output_type": "pil",
    }  # fmt: skip
    assert call_arguments(VIDEO, CAT, params(num_outputs_per_prompt=2, num_frames=5)) == {
        "prompt": "a cat", "num_videos_per_prompt": 2, "num_frames": 5,
    }  # fmt: skip


def test_what_a_pipeline_does_not_take_is_named_with_what_it_takes() -> None:
    assert refusal(VIDEO, height=480) == (
        "VideoPipeline does not take height (given: 480); it takes prompt, num_frames, guidance_scale, "
        "num_outputs_per_prompt, seed"
    )
    assert "does not take num_frames" in refusal(IMAGE, num_frames=5)
    assert "does not take negative_prompt" in refusal(VIDEO, negative_prompt="a dog")
    assert "does not take image" in refusal(IMAGE, Prompt(text="a cat", image=[1]))
    assert "does not take fps" in refusal(IMAGE, fps=24)
    bare = PipelineCapabilities(name="Bare", parameters={"prompt": None})
    assert "does not take seed" in refusal(bare, seed=3)
    assert "does not take num_outputs_per_prompt" in refusal(bare, num_outputs_per_prompt=2)
    assert call_arguments(bare, CAT, params(num_outputs_per_prompt=1)) == {"prompt": "a cat"}


def test_frames_per_second_are_for_the_file_where_the_pipeline_asks_for_none() -> None:
    assert "fps" not in call_arguments(VIDEO, CAT, params(fps=24))
    rated = PipelineCapabilities(name="Rated", parameters={"prompt": None, "frame_rate": 25}, makes_videos=True)
    assert call_arguments(rated, CAT, params(fps=24))["frame_rate"] == 24


def test_sizes_that_the_vae_cannot_make_are_refused() -> None:
    assert refusal(IMAGE, height=1001) == (
        "height=1001: ImagePipeline needs a multiple of 8, and draws multiples of 16; nearest: 992 or 1008"
    )
    assert refusal(IMAGE, width=16) == "width=16: ImagePipeline draws 32 pixels or more"
    assert "nearest: 5 or 9" in refusal(VIDEO, num_frames=8)
    assert "multiple of 8" in refusal(IMAGE, extra_args={"width": 41})


def test_sizes_that_diffusers_rounds_are_known() -> None:
    assert rounded_size(IMAGE, {"height": 1000, "width": 1016}) == (992, 992)
    assert rounded_size(IMAGE, {"height": 992, "width": 1024}) is None
    assert rounded_size(IMAGE, {"height": 1000}) is None


def test_guidance_that_would_be_ignored_is_refused() -> None:
    assert call_arguments(IMAGE, CAT, params(true_cfg_scale=2.0))["negative_prompt"] == " "
    assert "negative_prompt" not in call_arguments(IMAGE, CAT, params())
    assert "would ignore the negative prompt" in refusal(IMAGE, negative_prompt="a dog", true_cfg_scale=1.0)
    undistilled = PipelineCapabilities(name="Undistilled", parameters=IMAGE.parameters, ignores_guidance_scale=True)
    assert "use true_cfg_scale" in refusal(undistilled, guidance_scale=3.0)


def test_a_prompts_own_negative_prompt_goes_first() -> None:
    both = call_arguments(IMAGE, Prompt(text="a cat", negative_text="a dog"), params(negative_prompt="a bird"))
    assert both["negative_prompt"] == "a dog"


def test_sampling_defaults_fill_what_is_not_given() -> None:
    capabilities = PipelineCapabilities(
        name="Tuned",
        parameters=IMAGE.parameters,
        sampling_defaults={"width": 256, "true_cfg_scale": 2.0, "negative_prompt": "blurred", "num_frames": 5},
    )
    by_default = call_arguments(capabilities, CAT, params())
    assert (by_default["width"], by_default["true_cfg_scale"]) == (256, 2.0)
    assert by_default["negative_prompt"] == "blurred"
    assert "num_frames" not in by_default
    given = call_arguments(capabilities, CAT, params(width=64, true_cfg_scale=1.0))
    assert (given["width"], given["true_cfg_scale"]) == (64, 1.0)
    assert "negative_prompt" not in given


def test_extra_args_of_any_length_are_refused_in_a_few_words() -> None:
    for extra in ({"width": 10**5000}, {"height": -(10**5000)}, {"true_cfg_scale": -(10**5000)}, {"x" * 10**5: 1}):
        assert len(refusal(IMAGE, negative_prompt="a dog", extra_args=extra)) < 2001
    assert len(refusal(IMAGE, height=64, extra_args={"height": 10**5000})) < 200


def test_extra_args_are_the_pipelines_own() -> None:
    assert call_arguments(IMAGE, CAT, params(extra_args={"sigmas": [1.0]}))["sigmas"] == [1.0]
    assert "did you mean sigmas?" in refusal(IMAGE, extra_args={"sigma": [1.0]})
    assert "given twice" in refusal(IMAGE, width=64, extra_args={"width": 32})
    assert "cannot set 'generator'" in refusal(IMAGE, extra_args={"generator": None})
    anything = PipelineCapabilities(name="Anything", parameters={"prompt": None}, takes_anything=True)
    assert call_arguments(anything, CAT, params(extra_args={"odd": 1})) == {"prompt": "a cat", "odd": 1}


EMBEDDED = PipelineCapabilities(
    name="EmbeddedPipeline",
    parameters=dict.fromkeys(
        ("prompt", "negative_prompt", "true_cfg_scale", "prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds",
         "pooled_prompt_embeds", "latents", "num_images_per_prompt", "generator")
    ) | {"true_cfg_scale": 1.0},
    required=("prompt",),
    takes_generators=True,
    sampling_defaults={"negative_prompt": "blurred", "true_cfg_scale": 2.0},
)  # fmt: skip


def test_tensors_stand_for_the_texts_of_a_prompt() -> None:
    embeds, negative, mask = torch.randn(1, 7, 4), torch.randn(1, 5, 4), torch.ones(1, 7, dtype=torch.bool)
    tensors = {"prompt_embeds": embeds, "prompt_embeds_mask": mask, "negative_prompt_embeds": negative}
    made = call_arguments(EMBEDDED, Prompt(tensors=tensors), params(negative_prompt="for all others"))
    assert made.keys() == {"prompt", "true_cfg_scale", *tensors}
    assert made["prompt"] is None
    assert all(torch.equal(made[name], tensor) for name, tensor in tensors.items())
    # The user's may change while the request waits, and a view would travel with all that it is a view of.
    assert not any(made[name] is tensor for name, tensor in tensors.items())
    part = call_arguments(EMBEDDED, Prompt(tensors={"prompt_embeds": torch.randn(100, 7, 4)[:1]}), params())
    assert part["prompt_embeds"].untyped_storage().nbytes() == 7 * 4 * 4
    assert part["negative_prompt"] == "blurred"
    several = call_arguments(EMBEDDED, Prompt(tensors={"prompt_embeds": [embeds, embeds]}), params())
    assert [tensor.shape for tensor in several["prompt_embeds"]] == [(1, 7, 4)] * 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"text": "a cat", "tensors": {"prompt_embeds": torch.ones(1)}}, "prompt and prompt_embeds say the same"),
        (
            {
                "negative_text": "a",
                "tensors": {"prompt_embeds": torch.ones(1), "negative_prompt_embeds": torch.ones(1)},
            },
            "negative_prompt and negative_prompt_embeds say the same",
        ),
        ({"tensors": {"prompt_embed_mask": torch.ones(1)}}, "did you mean prompt_embeds_mask?"),
        ({"tensors": {"prompt_embeds": np.ones(3)}}, "prompt_embeds holds a ndarray: give a torch tensor"),
        ({"tensors": {"prompt_embeds": [torch.ones(1), "a"]}}, "prompt_embeds holds a str"),
        ({"tensors": {"latents": []}}, "latents holds a list"),
        ({"tensors": {"latents": torch.ones(1, device="meta")}}, "latents has no numbers"),
        ({"tensors": {"prompt_embeds": [torch.ones(1).to_sparse()]}}, "prompt_embeds has the layout torch.sparse_coo"),
    ],
)
def test_tensors_that_cannot_be(prompt: dict[str, Any], message: str) -> None:
    assert message in refusal(EMBEDDED, Prompt(**prompt))


def test_negative_embeddings_that_would_be_ignored_are_refused() -> None:
    both = {"prompt_embeds": torch.ones(1), "negative_prompt_embeds": torch.ones(1)}
    assert "would ignore the negative prompt" in refusal(EMBEDDED, Prompt(tensors=both), true_cfg_scale=1.0)
    assert "takes no such tensors" in refusal(VIDEO, Prompt(tensors={"prompt_embeds": torch.ones(1)}))


def test_a_list_of_seeds_is_one_for_each_output() -> None:
    assert call_arguments(EMBEDDED, CAT, params(seed=[1, 2, 3]))["num_images_per_prompt"] == 3
    assert call_arguments(EMBEDDED, CAT, params(seed=(1, 2), num_outputs_per_prompt=2))["num_images_per_prompt"] == 2
    assert "num_images_per_prompt" not in call_arguments(EMBEDDED, CAT, params(seed=[4]))
    assert "ImagePipeline takes one seed a call, and 2 are given" in refusal(IMAGE, seed=[1, 2])
    bare = PipelineCapabilities(name="Bare", parameters={"generator": None, "prompt": None}, takes_generators=True)
    assert "takes one seed a call" in refusal(bare, seed=[1, 2])


def test_a_check_keeps_the_size_of_given_latents() -> None:
    asked = params()
    given = call_arguments(IMAGE, CAT, asked) | {"latents": torch.ones(1)}
    assert "height" not in small_arguments(IMAGE, given, asked)
    assert small_arguments(IMAGE, given, asked)["num_inference_steps"] == 2


@pytest.fixture(scope="module")
def shapes() -> Any:
    pipe = load_pipeline(resolve_model(SHAPES_MODEL), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


SMALL = {"prompt": "a red circle", "height": 64, "width": 80, "num_inference_steps": 3, "output_type": "pil"}


def test_capabilities_of_the_demo_pipeline(shapes: Any) -> None:
    capabilities = inspect_pipeline(shapes)
    assert capabilities.name == "QwenImagePipeline"
    assert (capabilities.vae_multiple, capabilities.height_multiple, capabilities.width_multiple) == (8, 16, 16)
    assert capabilities.frames_multiple == 1
    assert not capabilities.makes_videos
    assert capabilities.ignores_guidance_scale
    assert capabilities.parameters["true_cfg_scale"] == 4.0


def test_the_result_is_the_plain_pipelines(shapes: Any) -> None:
    call: dict[str, Any] = SMALL | {"negative_prompt": " ", "true_cfg_scale": 2.0, "num_images_per_prompt": 2}
    plain = shapes(**call, generator=torch.Generator("cpu").manual_seed(7)).images
    steps: list[tuple[int, int]] = []
    ours = run_call(shapes, call, seed=7, device="cpu", on_step=lambda done, total: steps.append((done, total)))
    assert [image.size for image in ours.images] == [(80, 64)] * 2
    for one, other in zip(plain, ours.images, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert not np.array_equal(np.asarray(ours.images[0]), np.asarray(ours.images[1]))
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_pictures_of_a_list_of_seeds_are_those_of_each_seed(shapes: Any) -> None:
    assert inspect_pipeline(shapes).takes_generators
    together = run_call(shapes, SMALL | {"num_images_per_prompt": 3}, seed=(5, 7, 2**40), device="cpu").images
    for seed, image in zip((5, 7, 2**40), together, strict=True):
        alone = run_call(shapes, SMALL, seed=seed, device="cpu").images[0]
        assert np.abs(np.asarray(alone, dtype=np.int16) - np.asarray(image, dtype=np.int16)).max() <= 1


def test_tensors_are_brought_to_the_model(shapes: Any) -> None:
    given: dict[str, Any] = {}

    class Recorder(types.SimpleNamespace):
        def __call__(self, **call: Any) -> Any:
            given.update(call)
            return types.SimpleNamespace(images=[Image.new("RGB", (8, 8))])

    pipe = Recorder(components={"transformer": torch.nn.Linear(2, 2, dtype=torch.bfloat16)})
    pipe.components["transformer"].dtype = torch.bfloat16
    mask, noise = torch.ones(1, dtype=torch.int64), torch.ones(1)
    call = {"prompt_embeds": [torch.ones(1)], "prompt_embeds_mask": mask, "latents": noise, "sigmas": noise}
    run_call(pipe, call, seed=None, device="cpu")
    assert given["prompt_embeds"][0].dtype == torch.bfloat16
    assert (given["prompt_embeds_mask"].dtype, given["latents"].dtype) == (torch.int64, torch.float32)
    assert given["sigmas"] is noise


def test_seconds_of_every_stage(shapes: Any) -> None:
    took = run_call(shapes, SMALL, seed=7, device="cpu").timings
    assert took["num_steps"] == 3
    stages = [took["text_encoder_s"], took["denoise_s"], took["vae_s"]]
    assert min(stages) > 0
    assert took["total_s"] * 0.5 < sum(stages) <= took["total_s"]
    assert took["denoise_step_s"] == pytest.approx(took["denoise_s"] / 3)


def test_latents_come_as_they_are(shapes: Any) -> None:
    result = run_call(shapes, SMALL | {"output_type": "latent"}, seed=7, device="cpu")
    assert [tuple(latent.shape) for latent in result.images] == [(20, 32)]
    assert result.timings["vae_s"] == 0.0


def instance_attributes(pipe: Any) -> list[set[str]]:
    return [set(vars(part)) for part in (pipe, pipe.vae, pipe.text_encoder)]


def test_the_pipeline_is_as_it_was(shapes: Any) -> None:
    before = instance_attributes(shapes)
    run_call(shapes, SMALL, seed=7, device="cpu")
    assert instance_attributes(shapes) == before

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        run_call(shapes, SMALL | {"callback_on_step_end": fail}, seed=7, device="cpu")
    assert instance_attributes(shapes) == before


def test_the_pipelines_own_refusal_is_raised_as_ours(shapes: Any) -> None:
    with pytest.raises(
        SamplingParamsError, match="QwenImagePipeline refused the call: `max_sequence_length`"
    ) as caught:
        run_call(shapes, SMALL | {"max_sequence_length": 5000}, seed=7, device="cpu")
    assert caught.value.param == "max_sequence_length"


def test_an_error_in_the_middle_stays_what_it_is(shapes: Any) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no refusal")

    with pytest.raises(ValueError, match=r"^no refusal$"):
        run_call(shapes, SMALL | {"callback_on_step_end": fail}, seed=7, device="cpu")


@pytest.mark.filterwarnings("ignore")
def test_pictures_and_sizes_that_a_pipeline_stumbles_over_are_refused(tmp_path: Path) -> None:
    def refusal(save: Callable[[Path], None], **call: Any) -> SamplingParamsError:
        if not (tmp_path / save.__name__).exists():
            save(tmp_path / save.__name__)
        pipe = load_pipeline(resolve_model(tmp_path / save.__name__), device="cpu")
        pipe.set_progress_bar_config(disable=True)
        with pytest.raises(SamplingParamsError) as caught:
            run_call(pipe, {"prompt": "x", "num_inference_steps": 2, **call}, seed=7, device="cpu")
        return caught.value

    for size in ((1, 1), (3000, 1)):
        given = {"image": Image.new("RGB", size), "height": 32, "width": 32, "_auto_resize": False}
        error = refusal(save_flux_kontext, **given)
        shown = f"cannot start from pictures of {size[0]} x {size[1]} pixels (ZeroDivisionError: division by zero)"
        assert str(error) == f"FluxKontextPipeline {shown}: give at least 16 x 16"
        assert error.param == "image"
    # Its model says so, in the first forward.
    assert "refused the call: Width (40) cannot be greater than" in str(refusal(save_sd3, height=16, width=640))


@pytest.fixture(scope="module")
def wan() -> Any:
    """A tiny video pipeline; text embeddings are given, so it needs no text encoder."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer)


def test_capabilities_of_a_video_pipeline(wan: Any) -> None:
    capabilities = inspect_pipeline(wan)
    assert capabilities.makes_videos
    assert (capabilities.height_multiple, capabilities.width_multiple, capabilities.frames_multiple) == (16, 16, 4)


def test_videos_come_as_lists_of_pictures(wan: Any) -> None:
    asked = params(
        height=16, width=32, num_frames=5, num_inference_steps=2, guidance_scale=1.0,
        extra_args={"prompt_embeds": torch.randn(2, 7, 32)},
    )  # fmt: skip
    arguments = call_arguments(inspect_pipeline(wan), Prompt(), asked)
    result = run_call(wan, arguments, seed=7, device="cpu")
    assert result.images == []
    assert [[frame.size for frame in video] for video in result.videos] == [[(32, 16)] * 5] * 2
    assert result.timings["num_steps"] == 2


def test_sizes_of_other_families() -> None:
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

    vae = AutoencoderKL(block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4)  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    flux = FluxPipeline(
        scheduler=None, vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=transformer,
    )  # fmt: skip
    capabilities = inspect_pipeline(flux)
    assert (capabilities.height_multiple, capabilities.width_multiple) == (16, 16)
    assert not capabilities.ignores_guidance_scale


def bare(name: str) -> Any:
    """A pipeline of diffusers without any part: its signature, and the numbers it falls back to."""
    import diffusers

    pipeline = getattr(diffusers, name)
    return pipeline(**dict.fromkeys(pipeline._get_signature_keys(pipeline)[0]))


# name -> what it makes, whether it needs a picture, whether it takes one only, its own defaults of num_frames and fps
KINDS: dict[str, tuple[str, bool, bool, int | None, float]] = {
    "QwenImageEditPipeline": ("picture", True, True, None, 16),
    "QwenImageEditPlusPipeline": ("picture", True, False, None, 16),
    "FluxKontextPipeline": ("picture", False, True, None, 16),
    "Flux2Pipeline": ("picture", False, False, None, 16),
    "Kandinsky5T2IPipeline": ("picture", False, False, None, 16),
    "WanPipeline": ("video", False, True, 81, 16),
    "WanImageToVideoPipeline": ("video", True, True, 81, 16),
    "LTXPipeline": ("video", False, True, 161, 25),
    "LTXImageToVideoPipeline": ("video", True, True, 161, 25),
    "LTXConditionPipeline": ("video", False, False, 161, 25),
    "CogVideoXImageToVideoPipeline": ("video", True, True, 49, 16),
    "HunyuanVideoPipeline": ("video", False, True, 129, 16),
    "HunyuanVideoImageToVideoPipeline": ("video", True, True, 129, 16),
    "Kandinsky5T2VPipeline": ("video", False, True, 121, 16),
    "Kandinsky5I2VPipeline": ("video", True, True, 121, 16),
    "SanaVideoPipeline": ("video", False, True, 81, 16),
    "LTX2Pipeline": ("video", False, True, None, 24),
    "AudioLDM2Pipeline": ("sound", False, False, None, 16),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_real_pipelines_make_and_need(name: str) -> None:
    makes, needs_image, takes_one, num_frames, fps = KINDS[name]
    capabilities = inspect_pipeline(bare(name))
    assert capabilities.makes == makes
    assert capabilities.needs_image is needs_image
    takes_image = capabilities.argument_name("image") is not None
    assert capabilities.takes_one_image is (takes_one and takes_image)
    assert frames_per_second(capabilities, {}, None) == fps
    asked = params(
        num_frames=None if num_frames is None else num_frames, num_inference_steps=3, num_outputs_per_prompt=2
    )
    image = Image.new("RGB", (8, 8))
    arguments = call_arguments(capabilities, Prompt(text="a cat", image=image if takes_image else None), asked)
    assert set(arguments) <= set(capabilities.parameters)
    assert 2 in arguments.values()
    assert (image in arguments.values()) is takes_image
    if num_frames is not None:
        assert num_frames in arguments.values()
    if num_frames is not None and capabilities.frames_multiple > 1:
        assert "nearest" in refusal(
            capabilities, Prompt(text="a cat", image=image if takes_image else None), num_frames=6
        )
    if needs_image:
        assert f"{name} needs a picture to start from" in refusal(capabilities)
    if capabilities.takes_one_image:
        several = Prompt(text="a cat", image=[image, image])
        assert f"{name} starts from one picture, and 2 are given" in refusal(capabilities, several)
        alone = call_arguments(capabilities, Prompt(text="a cat", image=[image]), params())
        assert alone["image"] is image


def test_a_pipeline_of_ones_own_is_known_by_its_base_or_its_arguments() -> None:
    from diffusers import DiffusionPipeline, LTXPipeline

    class Mine(LTXPipeline):  # type: ignore[misc]
        pass

    class Film(DiffusionPipeline):  # type: ignore[misc]
        def __call__(self, prompt: str, num_frames: int = 5) -> None:
            pass

    class Drawing(DiffusionPipeline):  # type: ignore[misc]
        def __call__(self, prompt: str) -> None:
            pass

    made = {kind.__name__: inspect_pipeline(kind.__new__(kind)).makes for kind in (Mine, Film, Drawing)}
    assert made == {"Mine": "video", "Film": "video", "Drawing": "picture"}


def test_what_stands_in_for_a_picture() -> None:
    capabilities = inspect_pipeline(bare("WanImageToVideoPipeline"))
    arguments = call_arguments(capabilities, CAT, params(extra_args={"image_embeds": [1]}))
    assert (arguments["image"], arguments["image_embeds"]) == (None, [1])


def test_pictures_are_a_list_where_the_pipeline_has_a_list() -> None:
    capabilities = PipelineCapabilities(name="Several", parameters={"prompt": None, "images": None})
    image = Image.new("RGB", (8, 8))
    assert call_arguments(capabilities, Prompt(text="a cat", image=image), params())["images"] == [image]


def test_an_argument_without_a_default_is_asked_for() -> None:
    capabilities = PipelineCapabilities(
        name="Edit", parameters={"prompt": None, "video": None}, required=("video",), makes_videos=True
    )
    assert refusal(capabilities) == "Edit needs video: give it in extra_args"
    assert call_arguments(capabilities, CAT, params(extra_args={"video": [1]}))["video"] == [1]


def test_frame_rates_are_of_the_pipelines_own_kind() -> None:
    capabilities = inspect_pipeline(bare("LTXPipeline"))
    given = call_arguments(capabilities, CAT, params(fps=24.0))["frame_rate"]
    assert (given, type(given)) == (24, int)
    assert call_arguments(capabilities, CAT, params(fps=23.976))["frame_rate"] == 23.976
    assert frames_per_second(capabilities, {"frame_rate": 30}, None) == 30
    assert frames_per_second(VIDEO, {}, 12.5) == 12.5


def test_a_pipeline_that_keeps_to_an_area_draws_the_size_that_is_asked_for() -> None:
    capabilities = inspect_pipeline(bare("FluxKontextPipeline"))
    assert call_arguments(capabilities, CAT, params(height=512, width=768))["max_area"] == 512 * 768
    assert "max_area" not in call_arguments(capabilities, CAT, params(height=512))
    extra = {"max_area": 2**18}
    assert call_arguments(capabilities, CAT, params(height=512, width=768, extra_args=extra))["max_area"] == 2**18
    small = small_arguments(capabilities, call_arguments(capabilities, CAT, params()), params())
    assert small["max_area"] == small["height"] * small["width"] < 2**17
    assert small["_auto_resize"] is False


def test_a_check_is_small_by_default() -> None:
    capabilities = PipelineCapabilities(
        name="Video",
        parameters={"prompt": None, "frames": 81, "height": 480, "width": 832, "output_type": "np"},
        makes_videos=True,
        frames_multiple=4,
        height_multiple=16,
        width_multiple=16,
    )
    asked = params(height=32)
    assert small_arguments(capabilities, call_arguments(capabilities, CAT, asked), asked) == {
        "prompt": "a cat", "frames": 9, "height": 32, "width": 208, "output_type": "np",
    }  # fmt: skip


def result(output_type: str = "pil", **held: Any) -> CallResult:
    output = types.SimpleNamespace(**held)
    return result_of("Pipe", output, output_type=output_type, timings={})


def test_results_by_whatever_name() -> None:
    picture = Image.new("RGB", (8, 8))
    assert result(image=[picture]).images == [picture]
    assert result(images=[[picture, picture], [picture]]).images == [picture] * 3
    assert result(frames=[[picture] * 2] * 3).videos == [[picture] * 2] * 3
    assert result(video=[picture] * 5, sound=None).videos == [[picture] * 5]
    assert [video.shape for video in result(frames=np.zeros((5, 4, 4, 3))).videos] == [(5, 4, 4, 3)]
    assert [video.shape for video in result(frames=np.zeros((2, 5, 4, 4, 3))).videos] == [(5, 4, 4, 3)] * 2
    assert [video.shape for video in result("latent", frames=torch.zeros(2, 5, 4, 4)).videos] == [(5, 4, 4)] * 2


def test_sounds_are_channels_by_samples() -> None:
    for sounds, wanted in [
        (torch.zeros(3, 2, 50, dtype=torch.bfloat16), [(2, 50)] * 3),
        (np.zeros((3, 50)), [(1, 50)] * 3),
        ([torch.zeros(50)], [(1, 50)]),
    ]:
        found = result(audios=sounds).audios
        assert [sound.shape for sound in found] == wanted
        assert all(sound.dtype == np.float32 for sound in found)
    both = result(frames=[[Image.new("RGB", (8, 8))]], audio=torch.zeros(1, 2, 50))
    assert (len(both.videos), [sound.shape for sound in both.audios]) == (1, [(2, 50)])
    assert [sound.shape for sound in result(video=[1], sound=torch.zeros(2, 50)).audios] == [(2, 50)]
    assert result(frames=[[1]], audio=None).audios == []


def test_a_result_is_never_empty() -> None:
    from diffusers.pipelines.flux.pipeline_output import FluxPriorReduxPipelineOutput

    output = FluxPriorReduxPipelineOutput(prompt_embeds=torch.zeros(1), pooled_prompt_embeds=torch.zeros(1))
    with pytest.raises(UnsupportedModelError) as caught:
        result_of("Redux", output, output_type=None, timings={})
    assert str(caught.value) == (
        "Redux gave a FluxPriorReduxPipelineOutput (it holds: prompt_embeds, pooled_prompt_embeds), in which there are "
        "no pictures, videos or sounds"
    )


def test_a_result_that_differs_from_the_request_is_reported() -> None:
    picture = Image.new("RGB", (48, 32))
    capabilities = PipelineCapabilities(
        name="Film", parameters={"num_frames": 9, "height": 1, "width": 1}, height_multiple=16, width_multiple=16
    )
    drawn = result(frames=[[picture] * 5])
    assert output_deviation(capabilities, {"num_frames": 5, "height": 32, "width": 48}, drawn) is None
    assert output_deviation(capabilities, {"height": 40, "width": 48}, drawn) is None, "rounded_size() foresees it"
    assert output_deviation(capabilities, {"num_frames": 6, "height": 64, "width": 48}, drawn) == (
        "Film drew 48 x 32 pixels instead of 48 x 64 and 5 frames instead of 6, as it does on one process"
    )


def test_a_package_that_a_pipeline_stumbles_over_is_named(shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def clean(*_: Any, **__: Any) -> None:
        eval("ftfy.fix_text('a')", {})

    monkeypatch.setattr(type(shapes), "check_inputs", clean)
    with pytest.raises(ConfigError, match="QwenImagePipeline needs a package: pip install ftfy"):
        run_call(shapes, SMALL, seed=7, device="cpu")


def test_a_warm_up_brings_what_the_signature_asks_for() -> None:
    def brought(name: str) -> dict[str, Any]:
        arguments = warm_up_arguments(inspect_pipeline(bare(name)), 64, 96)
        assert arguments["num_inference_steps"] == 1
        looks = {key: (value.mode, value.size) for key, value in arguments.items() if isinstance(value, Image.Image)}
        rest = {key: arguments[key] for key in ("height", "width", "strength") if key in arguments}
        return looks | rest | {key: len(value) for key, value in arguments.items() if isinstance(value, list)}

    size = {"height": 64, "width": 96}
    grey, mask = ("RGB", (96, 64)), ("L", (96, 64))
    assert brought("QwenImagePipeline") == brought("FluxKontextPipeline") == size
    assert brought("QwenImageEditPipeline") == brought("WanImageToVideoPipeline") == size | {"image": grey}
    assert brought("QwenImageInpaintPipeline") == size | {"image": grey, "mask_image": mask, "strength": 1.0}
    assert brought("FluxControlPipeline") == size | {"control_image": grey}
    assert brought("StableDiffusionXLImg2ImgPipeline") == {"image": grey, "strength": 1.0}
    assert brought("LucyEditPipeline") == size | {"video": 17}
    assert brought("WanVideoToVideoPipeline") == size | {"video": 17, "strength": 1.0}
    with pytest.raises(SamplingParamsError, match="WanAnimatePipeline needs pose_video"):
        brought("WanAnimatePipeline")


@pytest.mark.filterwarnings("ignore")
def test_pipelines_that_start_from_pictures_can_be_warmed_up(tmp_path: Path) -> None:
    from diffusers import FluxInpaintPipeline, WanVideoToVideoPipeline

    def loaded(save: Callable[[Path], None]) -> Any:
        save(tmp_path / save.__name__)
        return load_pipeline(resolve_model(tmp_path / save.__name__), device="cpu")

    edits = FluxInpaintPipeline.from_pipe(loaded(save_flux_kontext))
    changes = WanVideoToVideoPipeline.from_pipe(loaded(save_wan))
    for pipe in (edits, changes, loaded(save_wan_i2v)):
        pipe.set_progress_bar_config(disable=True)
        result = run_call(pipe, warm_up_arguments(inspect_pipeline(pipe), 32, 48), seed=0, device="cpu")
        assert result.timings["num_steps"] == 1
        drawn = result.images or result.videos[0]
        assert drawn[0].size == (48, 32)
