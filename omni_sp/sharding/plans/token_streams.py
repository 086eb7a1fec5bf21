"""Classes whose rows of tokens do not begin at the first input of their first blocks."""

from collections.abc import Mapping

from omni_sp.sharding.plan import Split

TOKEN_STREAMS: dict[str, Mapping[str, Mapping[str, Split]]] = {
    # Its other list of blocks begins with the few tokens of a face.
    "ConsisIDTransformer3DModel": {"transformer_blocks.0": {"hidden_states": Split(dim=1)}},
    # Each stream has its own row in this one.
    "Cosmos3OmniTransformer": {"layers.0": {"und_seq": Split(dim=0), "gen_seq": Split(dim=0)}},
    "LTX2VideoTransformer3DModel": {
        "transformer_blocks.0": {"hidden_states": Split(dim=1), "audio_hidden_states": Split(dim=1)}
    },
    "WanVACETransformer3DModel": {
        "vace_blocks.0": {"hidden_states": Split(dim=1), "control_hidden_states": Split(dim=1)},
        "blocks.0": {"hidden_states": Split(dim=1)},
    },
    # Tokens come first here, the batch second.
    "ErnieImageTransformer2DModel": {"layers.0": {"x": Split(dim=0, ndim=3)}},
    # Places of a picture come first here, and each attends along its frames, which are few.
    "TransformerTemporalModel": {"transformer_blocks.0": {"hidden_states": Split(dim=0, ndim=3)}},
}

TOKENWISE = frozenset({"FeedForward", "MOEFeedForwardSwiGLU"})
"""Modules of one input (batch, tokens, channels) that treat each token alone: they run on the pieces as they are, also
where their code (a mixture of experts sorts tokens) does not look like it."""
