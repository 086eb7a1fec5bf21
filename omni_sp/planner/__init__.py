"""Which degrees pay for a model on a machine: predicted from configurations and published figures, without weights."""

from omni_sp.planner.cost import ModelCost, model_cost
from omni_sp.planner.estimate import Degrees, Estimate, estimate
from omni_sp.planner.inputs import Size
from omni_sp.planner.machines import Link, Machine, machine
from omni_sp.planner.search import Plan, plan

__all__ = [
    "Degrees",
    "Estimate",
    "Link",
    "Machine",
    "ModelCost",
    "Plan",
    "Size",
    "estimate",
    "machine",
    "model_cost",
    "plan",
]
