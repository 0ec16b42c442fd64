"""`python -m tokenizer.training.plot RUN --out curves.png`: the curves of a run from its log."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError, require_package
from tokenizer.training.trainer import LOG_FILE

PANELS = (
    ("loss",),
    ("image psnr", "video psnr"),
    ("image lpips",),
    ("train psnr",),
    ("psnr image", "psnr video", "psnr"),
)
"""Keys drawn together; the last panel is validation with averaged weights."""


def plot_run(log: Path, out: Path) -> None:
    """Draw every panel of a log that has values, training curves smoothed over 20 records.

    Raises:
        InputError: no log, an empty one, or matplotlib missing.
    """
    require_package("matplotlib", "drawing curves", "train")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = _records(log)
    panels = [[key for key in keys if any(key in record for record in records)] for keys in PANELS]
    panels = [keys for keys in panels if keys]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3), squeeze=False)
    for axis, keys in zip(axes[0], panels, strict=True):
        for key in keys:
            points = [(record["step"], record[key]) for record in records if key in record]
            window = 1 if key.startswith("psnr") else 20
            axis.plot([step for step, _ in points], _smooth([value for _, value in points], window), label=key)
        axis.set_xlabel("step")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    axes[0][-1].set_title("validation, dB" if panels[-1][0].startswith("psnr") else "", fontsize="small")
    figure.tight_layout()
    with atomic_path(out) as path:
        figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _records(log: Path) -> list[dict[str, Any]]:
    if not log.is_file():
        raise InputError(f"{log}: no log of a run here")
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not records:
        raise InputError(f"{log}: the log is empty")
    return records


def _smooth(values: list[float], window: int) -> list[float]:
    smoothed = []
    for i in range(len(values)):
        part = values[max(0, i - window + 1) : i + 1]
        smoothed.append(sum(part) / len(part))
    return smoothed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tokenizer.training.plot", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write (.png)")
    options = parser.parse_args(arguments)
    try:
        plot_run(options.run / LOG_FILE, options.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
