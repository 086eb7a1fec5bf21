"""A small Llama that goes on with Python source, and two speculators trained for it: what benchmarks.speculation runs.

Tokens are words, digits, blanks and single signs of the source files of Python's library; rare ones are one token. The
Llama learns from some files, prompts come from others. The speculators are trained by training.speculator, from its own
answers. Each part is saved when it is ready, so that an interrupted training goes on with the next part.
"""

from __future__ import annotations

import json
import math
import random
import re
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from tqdm import tqdm

Kind = Literal["mlp", "lstm"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WORD = re.compile(r"[^\W\d]+|\d|\s+|.", re.DOTALL)
UNKNOWN, LENGTH = 0, 128  # the token of rare words; tokens of a sequence that is learnt
PROMPT, ANSWER = 64, 96  # tokens of what the target answers to, and of what the speculators learn from
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


class Training(NamedTuple):
    """How long is trained.

    Attributes:
        target_steps: of the Llama, each of 8 sequences.
        speculator_steps: of a speculator, each of 8 answers.
        prompts: how many prompts the Llama answers for them.
    """

    target_steps: int = 400
    speculator_steps: int = 400
    prompts: int = 768


class Text(NamedTuple):
    """Token ids of files, one after the other.

    Attributes:
        learnt: of the files that the target learns from.
        others: of the rest.
    """

    learnt: list[int]
    others: list[int]


def source_text() -> Text:
    """The files of this Python's library, every fifth of which is not learnt."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    words = [WORD.findall(file.read_text(encoding="utf8", errors="ignore")) for file in files]
    counts = Counter(word for number, one in enumerate(words) if number % 5 for word in one)
    common = [word for word, _ in counts.most_common(SIZES["vocab_size"] - 1)]  # type: ignore[operator]
    ids = {word: index + 1 for index, word in enumerate(common)}
    tokens = [[ids.get(word, UNKNOWN) for word in one] for one in words]
    learnt = [token for number, one in enumerate(tokens) if number % 5 for token in one]
    return Text(learnt, [token for number, one in enumerate(tokens) if not number % 5 for token in one])


def prompts_from(tokens: list[int], count: int, seed: int) -> list[list[int]]:
    """Pieces of a text, drawn at random."""
    draw = random.Random(seed)
    starts = [draw.randrange(len(tokens) - PROMPT) for _ in range(count)]
    return [tokens[start : start + PROMPT] for start in starts]


def train_target(text: list[int], steps: int) -> Any:
    """A Llama that has learnt this text for so many steps."""
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    places, draw = torch.arange(LENGTH), torch.Generator().manual_seed(0)
    ids = torch.tensor(text)
    with tqdm(range(steps), desc="train target", unit="step") as progress:
        for step in progress:
            batch = ids[torch.randint(len(text) - LENGTH, (8, 1), generator=draw) + places]
            loss = model(input_ids=batch, labels=batch).loss
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model.eval().requires_grad_(False)


def make_models(folder: Path, training: Training) -> dict[str, Path]:
    """Train what is not in the folder yet.

    Args:
        folder: of the models.
        training: how long. A folder with models of another training is refused.

    Returns:
        The folders of "target", "mlp" and "lstm".
    """
    import transformers

    from omni_sp.llm.speculation import checkpoint
    from training.speculator.data import answer, load_answers, save_answers
    from training.speculator.settings import Settings
    from training.speculator.train import train

    torch.set_num_threads(1)  # two wait for each other where other work is on the machine
    folders = {name: folder / name for name in ("target", *KINDS)}
    note, content = folder / "training.json", json.dumps({**training._asdict(), **SIZES})
    if note.exists() and note.read_text() != content:
        raise SystemExit(f"{folder} has models of another training, {note.read_text()}: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(content)
    text = source_text()
    if not (folders["target"] / "config.json").exists():
        train_target(text.learnt, training.target_steps).save_pretrained(folders["target"])
    model = transformers.LlamaForCausalLM.from_pretrained(folders["target"]).eval().requires_grad_(False)
    answers = folder / "answers.jsonl"
    if not answers.exists():
        prompts = prompts_from(text.learnt, training.prompts, seed=1)
        save_answers(answers, answer(model, prompts, ANSWER, temperature=0.0, batch_size=32, seed=0))
    for kind in KINDS:
        if not (folders[kind] / "config.json").exists():
            settings = Settings(kind=kind, steps=training.speculator_steps, learning_rate=3e-3, length=PROMPT + ANSWER)
            speculator = train(model, load_answers(answers), settings)
            checkpoint.save(folders[kind], speculator.config, dict(speculator.named_parameters()))
    return folders
