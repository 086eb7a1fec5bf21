"""Train the demo model from nothing and export it: `python -m training.shapes --output DIR`.

Six stages run one after the other; each leaves its result in DIR and is skipped when that is there, and the long one,
the transformer, also continues from its last checkpoint.  So an interrupted run is resumed by the same command.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from training.shapes.settings import Settings

__all__ = ["main"]


def main() -> None:
    """Parse the command line and run the stages asked for."""
    stages: dict[str, Callable[[argparse.Namespace, Settings], None]] = {
        "tokenizer": _tokenizer,
        "text-encoder": _text_encoder,
        "autoencoder": _autoencoder,
        "transformer": _transformer,
        "export": _export,
        "evaluate": _evaluate,
    }
    parser = argparse.ArgumentParser(prog="python -m training.shapes", description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for checkpoints and, in pipeline/, the result"
    )
    parser.add_argument(
        "--pipeline", type=Path, help="folder of the exported pipeline, by default pipeline/ in the output"
    )
    parser.add_argument("--device", default="cpu", help="where to train: cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--stages", nargs="+", choices=list(stages), default=list(stages), help="stages to run")
    arguments = parser.parse_args()
    arguments.pipeline = arguments.pipeline or arguments.output / "pipeline"
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, stage in stages.items():
        if name in arguments.stages:
            start = time.monotonic()
            stage(arguments, Settings())
            print(f"{name}: done in {time.monotonic() - start:.0f} s", flush=True)


# The stages import their own modules, so that a stage needs no more than it uses.


def _tokenizer(arguments: argparse.Namespace, _: Settings) -> None:
    from training.shapes.text import train_tokenizer

    folder = arguments.output / "tokenizer"
    if not folder.exists():
        train_tokenizer().save_pretrained(folder)


def _text_encoder(arguments: argparse.Namespace, settings: Settings) -> None:
    from training.shapes.text import load_tokenizer, train_text_encoder

    folder = arguments.output / "text_encoder"
    if not folder.exists():
        tokenizer = load_tokenizer(arguments.output / "tokenizer")
        train_text_encoder(tokenizer, settings, torch.device(arguments.device)).save_pretrained(folder)


def _autoencoder(arguments: argparse.Namespace, settings: Settings) -> None:
    from training.shapes.autoencoder import train_autoencoder

    folder = arguments.output / "vae"
    if not folder.exists():
        train_autoencoder(settings, torch.device(arguments.device)).save_pretrained(folder)


def _transformer(arguments: argparse.Namespace, settings: Settings) -> None:
    from training.shapes.pool import load_pool
    from training.shapes.transformer import train_transformer

    device = torch.device(arguments.device)
    pool = load_pool(arguments.output, settings, device)
    # Every checkpoint is exported, so that the progress can be seen in pictures while the training goes on.
    train_transformer(pool, settings, arguments.output, device, on_checkpoint=lambda: _export(arguments, settings))


def _export(arguments: argparse.Namespace, settings: Settings) -> None:
    from training.shapes.export import export_pipeline

    export_pipeline(arguments.output, settings, arguments.pipeline)


def _evaluate(arguments: argparse.Namespace, _: Settings) -> None:
    from training.shapes.evaluate import evaluate

    evaluate(arguments.pipeline, torch.device(arguments.device), sheet=arguments.output / "sheet.png")


if __name__ == "__main__":
    main()
