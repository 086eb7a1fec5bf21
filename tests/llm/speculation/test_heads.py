"""Speculators from folders in Arctic's layout draft what the papers' formulas say, and what is wrong is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_sp.errors import ConfigError
from omni_sp.llm.speculation import checkpoint
from omni_sp.llm.speculation.checkpoint import SpeculatorConfig
from omni_sp.llm.speculation.heads import Speculator

VOCABULARY, INPUT, WIDTH, PLACES = 23, 10, 6, 3
SIZES = {"n_predict": PLACES, "vocab_size": VOCABULARY}
Weights = dict[str, Tensor]


def mlp_folder(folder: Path, *, tied: bool, scaled: bool) -> Weights:
    """An MLP's configuration in a folder, as such models are published, and random weights by the names of a file."""
    config = SIZES | {"emb_dim": INPUT, "inner_dim": WIDTH, "tie_weights": tied, "scale_input": scaled}
    write_config(folder, {"architectures": ["MLPSpeculatorPreTrainedModel"], **config})
    weights = dict[str, Tensor]()
    for index in range(PLACES):
        weights[f"emb.{index}.weight"] = torch.randn(VOCABULARY, WIDTH)
        weights[f"proj.{index}.weight"] = torch.randn(WIDTH, WIDTH if index else INPUT)
        weights[f"ln.{index}.weight"], weights[f"ln.{index}.bias"] = torch.randn(WIDTH), torch.randn(WIDTH)
        weights[f"head.{index}.weight"] = torch.randn(VOCABULARY, WIDTH)
        if tied and index:
            weights |= {f"{name}.{index}.weight": weights[f"{name}.0.weight"] for name in ("emb", "ln", "head")}
            weights[f"ln.{index}.bias"] = weights["ln.0.bias"]
            weights[f"proj.{index}.weight"] = weights["proj.1.weight"]
    return weights


def lstm_folder(folder: Path, *, tied: bool, tied_gates: bool, scaled: bool) -> Weights:
    """The same of an LSTM."""
    width = str(WIDTH)
    config = SIZES | {"input_hidden_dim": INPUT, "inner_dim": width, "emb_dim": width, "proj_dim": width}
    config |= {"tie_weights": tied, "tie_lstm_embs": tied_gates, "scale_input": scaled, "method": "sum_lstm"}
    write_config(folder, {"architectures": ["ArcticLSTMSpeculatorPreTrainedModel"], **config})
    weights = dict[str, Tensor]()
    for gate in ("forget", "input", "output", "cell"):
        for index in range(1 if tied else PLACES):
            own = torch.randn(VOCABULARY, WIDTH)
            shared = weights.get(f"forget_emb.{index}.weight", own)
            weights[f"{gate}_emb.{index}.weight"] = shared if tied_gates else own
        for index in range(2 if tied else PLACES):
            weights[f"{gate}_proj.{index}.weight"] = torch.randn(WIDTH, WIDTH if index else INPUT)
    for index in range(1 if tied else PLACES):
        for norm in ("cell_ln", "state_ln"):
            weights[f"{norm}.{index}.weight"] = torch.randn(WIDTH)
            weights[f"{norm}.{index}.bias"] = torch.randn(WIDTH)
    for index in range(PLACES):
        own = torch.randn(VOCABULARY, WIDTH)
        weights[f"head.{index}.weight"] = weights.get("head.0.weight", own) if tied else own
    return weights


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "mlp_speculator", **config}))


def rms(x: Tensor, weights: Weights | None = None, name: str = "") -> Tensor:
    x = x / (x.square().mean() + 1e-6).sqrt()
    return x if weights is None else x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    half: Tensor = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return half * x


def reference(weights: Weights, state: Tensor, token: int, *, kind: str, scaled: bool) -> list[Tensor]:
    """The logits of each place of one draft, from the formulas, with the names of a file, one vector at a time.

    Files of tied MLPs have every place's weights; of tied LSTMs, the first place's, and projections for two.
    """

    def of(name: str, index: int) -> str:
        return next(f"{name}.{at}" for at in range(index, -1, -1) if f"{name}.{at}.weight" in weights)

    w = 0.5 ** (0.5 / PLACES)
    a = math.sqrt((1 - w * w) * WIDTH / 2) / w
    if scaled:
        state = rms(state) / math.sqrt(2)
    cell, found = torch.zeros(WIDTH), list[Tensor]()
    for index in range(PLACES):

        def mix(gate: str, index: int = index, state: Tensor = state, token: int = token) -> Tensor:
            embedding, projection = weights[of(f"{gate}emb", index) + ".weight"], of(f"{gate}proj", index)
            mixed: Tensor = weights[f"{projection}.weight"] @ state + a * embedding[token]
            return mixed

        if kind == "mlp":
            state = gelu(rms(mix(""), weights, of("ln", index)))
        else:
            f, i, o = (torch.sigmoid(mix(f"{gate}_")) for gate in ("forget", "input", "output"))
            cell = cell * f + gelu(rms(mix("cell_"), weights, of("cell_ln", index))) * i
            state = gelu(rms(cell, weights, of("state_ln", index))) * o
        found.append(weights[f"head.{index}.weight"] @ state)
        token = int(found[-1].argmax())
    return found


def load(folder: Path) -> Speculator:
    config = checkpoint.read_config(folder)
    speculator = Speculator(config)
    speculator.load(checkpoint.weights(folder, config))
    return speculator


def as_safetensors(folder: Path, weights: Weights) -> None:
    save_file({f"speculator.{name}": tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")


def once_each(folder: Path, weights: Weights) -> None:
    """Tied weights once, under the name that comes first."""
    names = dict[int, str]()
    for name, tensor in weights.items():
        names.setdefault(tensor.data_ptr(), name)
    save_file({name: weights[name] for name in names.values()}, folder / "model.safetensors")


def as_pickle(folder: Path, weights: Weights) -> None:
    torch.save(weights, folder / "pytorch_model.bin")


def in_sequences(folder: Path, weights: Weights) -> None:
    """As a trainer writes layers that could have several stages."""
    parts = {name: name.split(".", 2) for name in weights}
    torch.save(
        {
            f"{stem}.{index}.0.{rest}" if stem in ("emb", "proj", "ln") else name: weights[name]
            for name, (stem, index, rest) in parts.items()
        },
        folder / "pytorch_model.bin",
    )


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("mlp", as_safetensors),
        ("mlp", as_pickle),
        ("mlp", in_sequences),
        ("mlp", once_each),
        ("lstm", as_safetensors),
        ("lstm", as_pickle),
        ("lstm-gates", once_each),
        ("lstm-gates", as_pickle),
    ],
)
def test_drafts_are_those_of_the_formulas_and_so_they_are_once_saved_again(
    tmp_path: Path, kind: str, write: Callable[[Path, Weights], None], tied: bool, scaled: bool
) -> None:
    torch.manual_seed(3)
    if kind == "mlp":
        weights = mlp_folder(tmp_path, tied=tied, scaled=scaled)
    else:
        weights = lstm_folder(tmp_path, tied=tied, tied_gates=kind == "lstm", scaled=scaled)
    write(tmp_path, weights)
    states, tokens = 3 * torch.randn(5, INPUT), torch.randint(VOCABULARY, (5,))
    expected = [
        reference(weights, state, int(token), kind=kind[:4].rstrip("-"), scaled=scaled)
        for state, token in zip(states, tokens, strict=True)
    ]
    speculator = load(tmp_path)
    for saved_as in (None, False, True):
        if saved_as is not None:
            folder = tmp_path / str(saved_as)
            checkpoint.save(folder, speculator.config, dict(speculator.named_parameters()), as_safetensors=saved_as)
            assert checkpoint.read_config(folder) == speculator.config
            speculator = load(folder)
        drafted = speculator.draft(states, tokens, PLACES)
        assert drafted.tolist() == [[int(one.argmax()) for one in places] for places in expected]
        assert speculator.draft(states, tokens, 2).tolist() == drafted[:, :2].tolist()
        given = torch.cat([tokens[:, None], drafted], 1)[:, :PLACES]  # as if what is drafted were the text
        logits = [speculator(states[row : row + 1, None], given[row : row + 1]) for row in range(5)]
        for own, places in zip(logits, expected, strict=True):
            for mine, theirs in zip(own, places, strict=True):
                torch.testing.assert_close(mine.flatten(), theirs, rtol=1e-5, atol=1e-5)


def test_a_text_gives_the_logits_of_its_places(tmp_path: Path) -> None:
    """Row t of place i sees state t and tokens t .. t + i, and nothing else."""
    torch.manual_seed(0)
    as_pickle(tmp_path, lstm_folder(tmp_path, tied=True, tied_gates=True, scaled=True))
    speculator = load(tmp_path)
    states, tokens = torch.randn(1, 7, INPUT), torch.randint(VOCABULARY, (1, 9))
    for index, logits in enumerate(speculator(states, tokens)):
        assert logits.shape == (1, 7, VOCABULARY)
        alone = speculator(states[:, 4:5], tokens[:, 4 : 4 + PLACES])[index]
        torch.testing.assert_close(logits[:, 4:5], alone)


def test_a_saved_speculator_has_the_names_that_arctic_reads(tmp_path: Path) -> None:
    config = SpeculatorConfig(
        kind="lstm", n_predict=3, vocab_size=9, input_width=8, width=4, base_architectures=("LlamaForCausalLM",)
    )
    speculator = Speculator(config)
    speculator.initialise(torch.Generator().manual_seed(0))
    checkpoint.save(tmp_path, config, dict(speculator.named_parameters()), as_safetensors=True)
    gates = ("forget", "input", "output", "cell")
    names = {f"{gate}_emb.0.weight" for gate in gates} | {f"{gate}_proj.{i}.weight" for gate in gates for i in (0, 1)}
    names |= {f"{norm}.0.{part}" for norm in ("cell_ln", "state_ln") for part in ("weight", "bias")}
    assert set(load_file(tmp_path / "model.safetensors")) == names | {f"head.{index}.weight" for index in range(3)}
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == ["ArcticLSTMSpeculatorPreTrainedModel"]
    assert (content["method"], content["inner_dim"], content["emb_dim"], content["proj_dim"]) == ("sum_lstm", *"444")
    assert (content["input_hidden_dim"], content["base_model_archs"]) == (8, ["LlamaForCausalLM"])


LSTM = {
    "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
    "method": "sum_lstm",
    "input_hidden_dim": 10,
    "inner_dim": "6",
    "emb_dim": "6",
    "proj_dim": "6",
    **SIZES,
}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architectures": ["EagleModel"]}, r"is of \['EagleModel'\]"),
        ({"architectures": None}, "is of None"),
        ({"emb_dim": "8"}, "emb_dim=8, inner_dim=6, proj_dim=6: only one width"),
        ({"inner_dim": "6.6"}, "inner_dim='6.6': layers of several stages"),
        ({"method": "sum_gru"}, "method='sum_gru'"),
        ({"n_predict": 0}, "n_predict in .*=0"),
        ({"vocab_size": None}, "vocab_size in .*=None"),
        ({"tie_weights": "yes"}, "tie_weights='yes'"),
        ({"input_hidden_dim": None}, "input_hidden_dim in"),
    ],
)
def test_another_configuration_is_refused_by_name(tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    write_config(tmp_path, LSTM | entries)
    with pytest.raises(ConfigError, match=message):
        checkpoint.read_config(tmp_path)


def test_a_folder_without_what_is_needed_is_refused_by_name(tmp_path: Path) -> None:
    weights = lstm_folder(tmp_path, tied=True, tied_gates=True, scaled=True)
    config = checkpoint.read_config(tmp_path)
    with pytest.raises(ConfigError, match="holds no weights"):
        list(checkpoint.weights(tmp_path, config))
    for changed, message in (
        ({name: tensor for name, tensor in weights.items() if name != "state_ln.0.bias"}, "no weight 'state_ln"),
        (weights | {"cell_emb.1.weight": weights["cell_emb.0.weight"]}, "a weight 'cell_emb.1.weight'"),
        (weights | {"head.0.weight": torch.zeros(VOCABULARY + 1, WIDTH)}, r"shape \(24, 6\), .* says \(23, 6\)"),
    ):
        as_pickle(tmp_path, changed)
        with pytest.raises(ConfigError, match=message):
            list(checkpoint.weights(tmp_path, config))
    for content in ("[]", "{"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json"):
            checkpoint.read_config(tmp_path)
