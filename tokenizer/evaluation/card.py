"""The figures of a bundled model's card, written by `atoken evaluate` itself.

    atoken evaluate --model atoken-nano --data packaged --preset nano --linear tests/linear_code.npz --card \\
        --out outputs/atoken-nano

or, from results that are there already:

    python -m tokenizer.evaluation.card outputs/atoken-nano/results.json

Everything between the two marks of the card's README is replaced; the rest is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tokenizer.api import AToken
from tokenizer.atomic import atomic_path
from tokenizer.checkpoints import bundled_models
from tokenizer.errors import InputError
from tokenizer.evaluation.command.markdown import table
from tokenizer.evaluation.command.results import COLUMNS, SAMPLES, Results, columns_of
from tokenizer.evaluation.command.systems import file_checksum, parts_digests

CARD: Final = "README.md"
BEGIN: Final = "<!-- figures on {data}: written by atoken evaluate --card -->"
"""data: the last part of --data; a card may hold figures on several sets."""
END: Final = "<!-- end of figures -->"

_TITLES: Final = {"image": "Photographs", "video": "Film", "asset": "3D assets"}
_COSTS: Final = ("encode_seconds", "decode_seconds", "memory_mb")
MAX_LISTED: Final = 24
"""Samples of a kind whose own figures the card lists."""

_ROW: Final = re.compile(r"^\| `(?P<sample>[^`]+)` \| (?P<system>[^|]+) \|(?P<values>.*)\|$")


def update_card(results: Results, samples: Sequence[Mapping[str, Any]]) -> Path:
    """Write the figures into the card of the first model.

    Args:
        results: what results.json holds.
        samples: the lines of samples.jsonl.

    Returns:
        The card.

    Raises:
        InputError: the first system is no bundled model, was measured with other weights than are bundled, or its card
            has no place for figures.
    """
    card = find_card(results["systems"], results["data"]["source"])
    text, begin = card.read_text(encoding="utf-8"), begin_mark(results["data"]["source"])
    start = text.find(begin)
    end = text.find(END, start)
    with atomic_path(card) as temporary:
        figures = card_figures(results, samples)
        temporary.write_text(f"{text[:start]}{begin}\n{figures}\n{text[end:]}", encoding="utf-8")
    return card


def find_card(systems: Mapping[str, Any], data: str) -> Path:
    """The card that figures are written into, which can be told before anything is measured.

    Args:
        systems: facts of each by name, as results have them.
        data: what --data named.

    Raises:
        InputError: as `update_card`.
    """
    name = next(iter(systems))
    folder = bundled_models().get(name)
    if folder is None:
        raise InputError(f"--card: '{name}' is not a bundled model; cards are theirs")
    measured = systems[name]
    bundled = file_checksum(name), parts_digests(AToken.from_pretrained(name))
    if (measured.get("weights_sha256"), measured.get("parts")) != bundled:
        raise InputError(f"--card: '{name}' has other weights than those bundled, whose figures alone its card takes")
    card = folder / CARD
    text, begin = card.read_text(encoding="utf-8"), begin_mark(data)
    start = text.find(begin)
    if start < 0 or text.find(END, start) < 0:
        raise InputError(f"{card}: has no lines '{begin}' and '{END}' to write figures between")
    return card


def begin_mark(data: str) -> str:
    """The line before the figures on what --data named."""
    return BEGIN.format(data=Path(data).name)


def card_figures(results: Results, samples: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: what was measured, a table of systems and one of samples for each kind, and the command.

    Costs are left out: they are of the machine, not of the model.
    """
    preset, name = results["preset"], next(iter(results["systems"]))
    machine, model = results["machine"], results["systems"][name]
    place = machine["device"].split()[0].upper()
    weights = f"weights `{model['weights_sha256'][:16]}…`"
    if "asset" in results["kinds"] and "gaussian_decoder" in model["parts"]:
        weights += f", Gaussian decoder `{model['parts']['gaussian_decoder'][:16]}…`"
    told = (
        f"{preset['protocol']} In {machine['dtype']} on a {place}; {weights}. In brackets 95 % bootstrap "
        "intervals over samples. Bits are those of latents as stored in this type; in bfloat16 they are half as many."
    )
    lines = ["", *textwrap.wrap(told, 120)]
    for kind, rows in results["kinds"].items():
        columns = [column for column in columns_of(rows) if column not in _COSTS]
        lines += ["", f"### {_TITLES[kind]}", "", *table(rows, columns)]
        shown = [column for column in ("psnr", "ssim", "lpips_vgg16", "lpips_alexnet") if column in columns]
        lines += _sample_table([sample for sample in samples if sample.get("kind") == kind], shown)
    lines += ["", *(f"- {note}" for note in results["notes"]), "", "```sh", results["command"], "```", ""]
    return "\n".join(lines)


def _sample_table(samples: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """One row for each sample and system; nothing for a set too large to be read row by row."""
    if len(samples) > MAX_LISTED:
        return []
    lines = ["", "| sample | system |" + "".join(f" {COLUMNS[column].title} |" for column in columns)]
    lines += ["|---|---|" + "---:|" * len(columns)]
    for sample in samples:
        for system, figures in sample["systems"].items():
            cells = [f" {figures[column]:.{COLUMNS[column].digits}f} |" for column in columns]
            lines.append(f"| `{sample['id']}` | {system} |{''.join(cells)}")
    return lines


def read_card(name: str, data: str) -> dict[str, dict[str, list[float]]]:
    """What the card of a bundled model states of a data set: {sample: {system: [PSNR, SSIM, LPIPS VGG, AlexNet]}}."""
    text = (bundled_models()[name] / CARD).read_text(encoding="utf-8")
    start = text.index(begin_mark(data))
    found: dict[str, dict[str, list[float]]] = {}
    for line in text[start : text.index(END, start)].splitlines():
        row = _ROW.match(line)
        if row is not None:
            values = [float(cell) for cell in row["values"].split("|")]
            found.setdefault(row["sample"], {})[row["system"].strip()] = values
    return found


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl in a folder of results.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / SAMPLES
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenizer.evaluation.card", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("results", type=Path, help="results.json of atoken evaluate")
    options = parser.parse_args(argv)
    try:
        results = json.loads(options.results.read_text(encoding="utf-8"))
        card = update_card(results, read_samples(options.results.parent))
    except (InputError, OSError, ValueError, KeyError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"wrote {card}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
