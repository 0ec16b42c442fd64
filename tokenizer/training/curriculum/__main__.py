"""`python -m tokenizer.training.curriculum --config FILE key=value ...`; the same under torchrun."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tokenizer.cli.outcome import run


def main(arguments: list[str]) -> int:
    """Command line of this package; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokenizer.training.curriculum", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, see configs/tokenizer/stages/")
    parser.add_argument("--device", default="auto", help="cpu or cuda; auto takes CUDA where there is one")
    parser.add_argument("overrides", nargs="*", help="settings to change, as key=value")
    options = parser.parse_args(arguments)

    def command() -> int:
        from tokenizer.training.curriculum.launch import launch

        return launch(options.config, options.overrides, options.device)

    return run(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
