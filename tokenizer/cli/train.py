"""`atoken train`: a stage of the curriculum on this machine, from the YAML file that a cluster would use too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Option(help="A YAML file, see configs/tokenizer/stages/.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change.", metavar="KEY=VALUE", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto takes CUDA where there is one.")] = "auto",
) -> int:
    """Train a stage of the curriculum; a run that was stopped goes on when it is started again.

    Writes metrics.jsonl, speed.jsonl, TensorBoard logs, pictures and checkpoints into the folder `out` of the
    configuration, and the averaged model into its folder `model`. SIGTERM and Ctrl-C end the step, write a checkpoint
    and exit with status 143 or 130. On several GPUs: torchrun --nproc-per-node 8 -m tokenizer.cli train --config ...

    \b
    Example:
      atoken train --config configs/tokenizer/stages/nano-stage1.yaml steps=500 out=runs/try
    """
    from tokenizer.cli.signals import signals_kill
    from tokenizer.training.curriculum.launch import launch

    with signals_kill():  # training handles the first signal itself, and means the second one to be the end
        return launch(config, overrides or [], device)
