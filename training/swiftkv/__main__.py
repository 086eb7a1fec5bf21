"""Distil a SwiftKV model from a Llama, Qwen2 or Qwen3, and save it as its checkpoints are published.

Only the late layers' queries, keys and values learn, and one norm; everything else is the teacher's. Serve the result
with `vllm serve DIR`. An interrupted run goes on by the same command.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from omni_sp.errors import InvalidInputError
from omni_sp.llm.swiftkv import ARCHITECTURES
from training.output import require_finite, require_own_folder
from training.swiftkv.data import random_sequences, read_sequences
from training.swiftkv.distill import compare, distill
from training.swiftkv.settings import Settings
from training.swiftkv.student import build_student, export, learning

__all__ = ["main"]

_HELD_OUT = 0.05  # share of the sequences that only the comparison sees
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, and run: texts, distillation, comparison, export."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (InvalidInputError, OSError) as error:  # OSError: a file or model that is not there
        parser.error(str(error))


def _run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    require_own_folder(options.output, ARCHITECTURES)
    teacher, tokenizer = _load(options)
    layers = teacher.config.num_hidden_layers
    given = options.num_key_value_layers
    settings = Settings(
        num_key_value_layers=max(1, layers // 2) if given is None else given,
        key_value_group_size=options.key_value_group_size,
        steps=options.steps,
        batch_size=options.batch_size,
        length=options.length,
        learning_rate=options.learning_rate,
        temperature=options.temperature,
        seed=options.seed,
    )
    student = build_student(teacher, settings.num_key_value_layers, settings.key_value_group_size)
    longest = getattr(teacher.config, "max_position_embeddings", settings.length)
    if settings.length > longest:
        raise InvalidInputError(f"--length {settings.length} is more than the {longest} tokens that the teacher takes")
    if options.data:
        sequences = read_sequences(tokenizer, options.data, settings.length)
    else:
        sequences = random_sequences(teacher.config.vocab_size, 512, settings.length, settings.seed)
    held_out = max(1, round(_HELD_OUT * len(sequences)))
    if len(sequences) == held_out:
        raise InvalidInputError(f"{len(sequences)} sequence of {settings.length} tokens is too little: give more text")
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"before: {compare(teacher, student, sequences[:held_out], settings.batch_size)}", flush=True)
    checkpoint = options.output / "distillation.pt"
    texts = [str(file.resolve()) for file in options.data or ()]
    run = {**asdict(settings), "teacher": options.teacher, "data": texts, "dtype": options.dtype}
    distill(teacher, student, sequences[held_out:], settings, checkpoint, run)
    require_finite(learning(student))
    print(f"after: {compare(teacher, student, sequences[:held_out], settings.batch_size)}", flush=True)
    export(student, options.output, tokenizer)
    checkpoint.unlink(missing_ok=True)
    late = layers - settings.num_key_value_layers
    print(f"saved to {options.output}: prompts skip {late} of {layers} layers")


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    import transformers

    teacher = transformers.AutoModelForCausalLM.from_pretrained(options.teacher, dtype=_DTYPES[options.dtype])
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.teacher)
    return teacher.eval().to(options.device), tokenizer


def _parser() -> argparse.ArgumentParser:
    default = Settings(num_key_value_layers=1)
    parser = argparse.ArgumentParser(
        prog="python -m training.swiftkv", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help="folder or hub id of a Llama, Qwen2 or Qwen3")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    parser.add_argument(
        "--data", type=Path, nargs="+", metavar="FILE",
        help='texts to learn from; or .jsonl with "text" or "messages" in each line. Without: random tokens, for a try',
    )  # fmt: skip
    parser.add_argument(
        "--num-key-value-layers", type=int, metavar="N",
        help="layers that keep keys and values of their own, from the first on (half of them)",
    )  # fmt: skip
    parser.add_argument(
        "--key-value-group-size", type=int, default=1, metavar="G", help="of the others, G share keys and values (1)"
    )
    parser.add_argument("--steps", type=int, default=default.steps, help=f"({default.steps})")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help=f"({default.batch_size})")
    parser.add_argument("--length", type=int, default=default.length, help=f"tokens of a sequence ({default.length})")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, help=f"({default.learning_rate})")
    parser.add_argument("--temperature", type=float, default=default.temperature, help=f"({default.temperature})")
    parser.add_argument("--seed", type=int, default=default.seed, help=f"({default.seed})")
    parser.add_argument("--device", default="cpu", help="where to train: cpu or cuda (cpu)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the teacher's weights (float32)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    return parser


if __name__ == "__main__":
    main()
