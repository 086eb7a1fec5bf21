"""Another scheduler for one call: made from the loaded one's configuration, fit for the model, and gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from omni_sp import SamplingParamsError
from omni_sp.pipelines.schedulers import scheduler_replaced


class Pipe:
    """What of a pipeline is looked at."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler


FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
DIFFUSION = DDIMScheduler(beta_start=0.001, prediction_type="v_prediction")
WAN = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def made(loaded: Any, chosen: Any) -> Any:
    pipe = Pipe(loaded)
    with scheduler_replaced(pipe, chosen):
        found = pipe.scheduler
    assert pipe.scheduler is loaded
    return found


def refusal(loaded: Any, chosen: Any) -> str:
    pipe = Pipe(loaded)
    with pytest.raises(SamplingParamsError) as caught, scheduler_replaced(pipe, chosen):
        pass
    assert caught.value.param == "scheduler"
    assert pipe.scheduler is loaded
    return str(caught.value)


def test_options_replace_entries_of_the_loaded_configuration() -> None:
    changed = made(FLOW, ("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}))
    assert (changed.config.shift, changed.config.use_dynamic_shifting) == (7.0, True)
    assert FLOW.config.shift == 3.0
    assert made(FLOW, None) is FLOW
    assert made(FLOW, "FlowMatchEulerDiscreteScheduler") is not FLOW


def test_a_flow_stays_a_flow_whatever_its_options_are_called() -> None:
    other = made(FLOW, "UniPCMultistepScheduler")
    assert isinstance(other, UniPCMultistepScheduler)
    assert other.config.use_flow_sigmas
    assert (other.config.prediction_type, other.config.flow_shift) == ("flow_prediction", 3.0)
    assert made(WAN, "FlowMatchEulerDiscreteScheduler").config.shift == 5.0
    assert made(WAN, ("FlowMatchEulerDiscreteScheduler", {"shift": 2.0})).config.shift == 2.0


def test_what_predicts_something_else_is_refused() -> None:
    message = refusal(FLOW, "EulerDiscreteScheduler")
    assert message.startswith(
        "EulerDiscreteScheduler steps by epsilon, and cannot take the place of FlowMatchEulerDiscreteScheduler, which "
        "steps by flow_prediction: use one of"
    )
    assert "UniPCMultistepScheduler" in message
    assert "cannot take the place" in refusal(FLOW, ("EulerDiscreteScheduler", {"prediction_type": "flow_prediction"}))
    assert "cannot take the place" in refusal(FLOW, ("UniPCMultistepScheduler", {"prediction_type": "epsilon"}))
    assert "cannot take the place" in refusal(WAN, "DDIMScheduler")
    assert "cannot take the place" in refusal(DIFFUSION, "FlowMatchEulerDiscreteScheduler")
    assert "cannot take the place" in refusal(DIFFUSION, "CogVideoXDDIMScheduler")


def test_schedulers_of_diffusion_replace_each_other() -> None:
    euler = made(DIFFUSION, "EulerDiscreteScheduler")
    assert isinstance(euler, EulerDiscreteScheduler)
    assert (euler.config.prediction_type, euler.config.beta_start) == ("v_prediction", 0.001)
    assert (
        made(DIFFUSION, ("EulerDiscreteScheduler", {"prediction_type": "epsilon"})).config.prediction_type == "epsilon"
    )


def test_names_and_options_that_there_are_not() -> None:
    assert "no scheduler 'UniPCMultistpScheduler'; did you mean UniPCMultistepScheduler?" in refusal(
        FLOW, "UniPCMultistpScheduler"
    )
    for name in ("", "QwenImagePipeline", "SchedulerMixinX", "__name__", "utils"):
        assert "diffusers has no scheduler" in refusal(FLOW, name)
    assert "no option 'shft'; did you mean shift?" in refusal(FLOW, ("FlowMatchEulerDiscreteScheduler", {"shft": 1.0}))
    both = {"use_karras_sigmas": True, "use_exponential_sigmas": True}
    assert "cannot be made with" in refusal(FLOW, ("FlowMatchEulerDiscreteScheduler", both))
    assert "Pipe has no scheduler" in refusal(None, "FlowMatchEulerDiscreteScheduler")
