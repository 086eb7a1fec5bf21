"""Train an LSTM or MLP that drafts a language model's next tokens, and export it in the layout of Arctic Inference.

It learns from the target's own answers, to prompts from a file or of random tokens, or from a given text. Serve it with
vllm serve MODEL --speculative-config '{"method": "arctic", "model": "DIR", "enable_suffix_decoding": true}'.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from omni_sp.errors import ConfigError, InvalidInputError
from omni_sp.llm.speculation import checkpoint
from omni_sp.validation import require_int, require_number
from training.output import require_finite, require_own_folder
from training.speculator.data import (
    Sequences,
    answer,
    load_answers,
    random_prompts,
    save_answers,
    split_text,
)
from training.speculator.evaluate import simulate
from training.speculator.settings import Settings
from training.speculator.train import train

__all__ = ["main"]

_HELD_OUT = 0.05  # share of the sequences that only the evaluation sees


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, and run: sequences, training, evaluation, export."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (InvalidInputError, OSError) as error:  # OSError: a file or model that is not there
        parser.error(str(error))


def _run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    settings = Settings(
        kind=options.kind,
        n_predict=options.n_predict,
        width=options.width,
        tie_weights=not options.untied,
        tie_gates=not options.untied_gates,
        scale_input=not options.unscaled,
        steps=options.steps,
        batch_size=options.batch_size,
        length=options.length,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    for name in ("answer_tokens", "random_prompts"):
        require_int(f"--{name.replace('_', '-')}", getattr(options, name), minimum=1, error=ConfigError)
    require_number("--temperature", options.temperature, minimum=0, error=ConfigError, hint="give a number from 0 on")
    require_own_folder(options.output, checkpoint.ARCHITECTURES)
    target = _load_target(options)
    options.output.mkdir(parents=True, exist_ok=True)
    learnt, held_out = _split(_sequences(target, options, settings))
    speculator = train(target, learnt, settings)
    require_finite(dict(speculator.named_parameters()))
    print(f"{len(held_out.tokens)} sequences that it has not seen: {simulate(target, speculator, held_out)}")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.dtype]
    parameters = {name: parameter.to(dtype) for name, parameter in speculator.named_parameters()}
    checkpoint.save(options.output, speculator.config, parameters, as_safetensors=options.safetensors)
    print(f"a speculator of {sum(map(torch.numel, parameters.values())):,} numbers, saved to {options.output}")


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m training.speculator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, metavar="MODEL", help="folder or hub id of the model to draft for")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the speculator")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompts", type=Path, metavar="FILE", help="prompts that the target answers, one a line")
    source.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="text to learn from instead of answers")
    source.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="answers that are there already, in the form that DIR/answers.jsonl has",
    )
    parser.add_argument(
        "--random-prompts", type=int, default=256, metavar="N", help="without these: N prompts of random tokens (256)"
    )
    parser.add_argument("--answer-tokens", type=int, default=256, metavar="N", help="tokens of an answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answers (0: the most likely tokens)")
    parser.add_argument("--kind", choices=("lstm", "mlp"), default=default.kind, help="(lstm)")
    parser.add_argument("--n-predict", type=int, default=default.n_predict, metavar="N", help="tokens of a draft (3)")
    parser.add_argument("--width", type=int, metavar="N", help="of its states (the target's width)")
    parser.add_argument("--untied", action="store_true", help="own weights for each token of a draft")
    parser.add_argument("--untied-gates", action="store_true", help="own embeddings for the gates of an LSTM")
    parser.add_argument("--unscaled", action="store_true", help="take the target's states without normalising them")
    parser.add_argument("--steps", type=int, default=default.steps, metavar="N", help="optimizer steps (3000)")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, metavar="N", help="sequences a step (8)")
    parser.add_argument("--length", type=int, default=default.length, metavar="N", help="tokens of a sequence (512)")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, help="its highest (0.001)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of weights, order and answers (0)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of what is saved")
    parser.add_argument("--safetensors", action="store_true", help="save model.safetensors, not pytorch_model.bin")
    parser.add_argument("--device", default="cpu", help="where to train: cpu or cuda (cpu)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads (2)")
    return parser


def _load_target(options: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.target).to(options.device).eval().requires_grad_(False)


def _sequences(target: Any, options: argparse.Namespace, settings: Settings) -> Sequences:
    if options.answers is not None:
        return load_answers(options.answers, target.config.get_text_config().vocab_size)
    if options.text is not None:
        return split_text(_tokenizer(options), options.text, settings.length)
    if options.prompts is not None:
        tokenizer, lines = _tokenizer(options), options.prompts.read_text(encoding="utf-8").splitlines()
        prompts = [list(tokenizer(line).input_ids) for line in lines if line.strip()]
    else:
        vocab_size = target.config.get_text_config().vocab_size
        prompts = random_prompts(vocab_size, options.random_prompts, 8, settings.seed)
    answers = answer(
        target,
        [prompt for prompt in prompts if prompt],
        options.answer_tokens,
        temperature=options.temperature,
        batch_size=32,
        seed=settings.seed,
    )
    save_answers(options.output / "answers.jsonl", answers)
    return answers


def _tokenizer(options: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(options.target)


def _split(sequences: Sequences) -> tuple[Sequences, Sequences]:
    """Sequences to learn from, and others, evenly out of them, to look at afterwards; few serve for both."""
    every = round(1 / _HELD_OUT)
    pairs = list(zip(*sequences, strict=True))
    held_out = pairs[every - 1 :: every] or pairs[:1]
    learnt = [pair for number, pair in enumerate(pairs) if number % every != every - 1]
    first, second = (Sequences([one for one, _ in part], [start for _, start in part]) for part in (learnt, held_out))
    return first, second


if __name__ == "__main__":
    main()
