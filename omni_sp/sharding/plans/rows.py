"""Classes whose rows of tokens do not begin at the first input of their first blocks."""

from collections.abc import Mapping

from omni_sp.sharding.plan import Split

ROWS: dict[str, Mapping[str, Mapping[str, Split]]] = {
    # Tokens come first here, the batch second.
    "ErnieImageTransformer2DModel": {"layers.0": {"x": Split(dim=0, ndim=3)}},
}
