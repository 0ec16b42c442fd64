"""From a measurement to results.json: figures with intervals, and everything that is needed to get them again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tokenizer.atomic import atomic_path
from tokenizer.evaluation.accumulate import Records
from tokenizer.evaluation.bootstrap import LEVEL, RESAMPLES, bootstrap_ratio
from tokenizer.evaluation.command.identity import text_checksum
from tokenizer.evaluation.command.measurement import Measurement
from tokenizer.evaluation.command.names import printable
from tokenizer.evaluation.command.presets import KINDS, Kind
from tokenizer.evaluation.command.runner import Plan
from tokenizer.evaluation.command.understanding import PROMPTS, retrieval, zero_shot
from tokenizer.evaluation.features import I3D_MIN_FRAMES
from tokenizer.evaluation.metrics import LPIPS_MIN_SIDE, SETTINGS, SSIM_RADIUS

FORMAT: Final = "atoken-evaluation"
VERSION: Final = 1
RESULTS, SAMPLES = "results.json", "samples.jsonl"
LISTED: Final = 3
"""Samples that a note names."""

Results = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A figure in tables. better: +1 if more is better, -1 if less is, 0 for neither."""

    title: str
    digits: int
    better: int
    meaning: str


COLUMNS: Final = {
    "psnr": Column("PSNR dB", 2, 1, SETTINGS["psnr"]),
    "ssim": Column("SSIM", 4, 1, SETTINGS["ssim"]),
    "lpips_vgg16": Column("LPIPS VGG", 4, -1, f"{SETTINGS['lpips']}; VGG16"),
    "lpips_alexnet": Column("LPIPS Alex", 4, -1, f"{SETTINGS['lpips']}; AlexNet"),
    "fid": Column("rFID", 3, -1, "Fréchet distance over Inception features"),
    "fvd": Column("rFVD", 3, -1, "Fréchet distance over I3D features"),
    "fd-lite0": Column("FD-Lite0", 4, -1, "Fréchet distance over EfficientNet-Lite0 features; no FID"),
    "fd-lite0-frames": Column(
        "FD-Lite0 frames", 4, -1, "the same over means of the features of a clip's frames; no FVD"
    ),
    "top1": Column("top-1", 4, 1, "zero-shot accuracy: share of samples whose class is nearest"),
    "top5": Column("top-5", 4, 1, "share whose class is among the five nearest"),
    "t2v_r1": Column("text→ R@1", 4, 1, "share of captions whose sample is nearest"),
    "t2v_r5": Column("text→ R@5", 4, 1, "among the five nearest"),
    "t2v_r10": Column("text→ R@10", 4, 1, "among the ten nearest"),
    "v2t_r1": Column("→text R@1", 4, 1, "share of samples to which a caption of theirs is nearest"),
    "v2t_r5": Column("→text R@5", 4, 1, "among the five nearest"),
    "v2t_r10": Column("→text R@10", 4, 1, "among the ten nearest"),
    "bits_per_pixel": Column("bits/pixel", 3, 0, "all bits over all pixels of all frames; latents as stored"),
    "tokens": Column("tokens", 0, 0, "mean for a sample"),
    "bits": Column("bits", 0, 0, "mean for a sample"),
    "encode_seconds": Column("encode s", 3, -1, "mean for a sample, one at a time"),
    "decode_seconds": Column("decode s", 3, -1, "mean for a sample, one at a time"),
    "memory_mb": Column("peak MB", 0, 0, "most memory in use: of torch on CUDA, else of the whole process"),
}
"""Everything that tables show, in this order."""


_SMALL: Final = "the others have a side below {} pixels"
_WHY: Final = {
    "ssim": _SMALL.format(2 * SSIM_RADIUS + 1),
    **{f"lpips_{name}": _SMALL.format(side) for name, side in LPIPS_MIN_SIDE.items()},
    "fvd": f"the others have fewer than {I3D_MIN_FRAMES} frames",
    "top1": "the others have no class, or none that --labels names",
    "t2v_r1": "the others have no captions",
}
"""Why a figure is of some samples alone."""


def make_results(plan: Plan, measurement: Measurement, facts: Mapping[str, Any], notes: Sequence[str] = ()) -> Results:
    """All results.

    Args:
        measurement: of all processes.
        facts: what else identifies the run: command, versions, device, networks.
        notes: what was left out of the tables, and why.

    Returns:
        What results.json holds. `kinds` has, by kind and system, `figures` {name: value, low, high, n}, `frechet`
        (`FrechetMeter.result`), `zero_shot`, `retrieval`, and `not_handled` {sample: why this baseline cannot take it}.
        All text in it can be written as UTF-8.
    """
    kinds = {kind: _of_kind(plan, measurement, kind) for kind in KINDS}
    kinds = {kind: rows for kind, rows in kinds.items() if rows}
    counts = {kind: sum(known.kind == kind for known in measurement.known.values()) for kind in KINDS}
    shown = {name for rows in kinds.values() for row in rows.values() for name in row["figures"]}
    digests = "\n".join(f"{sample} {known.sha256}" for sample, known in measurement.known.items())
    results: Results = {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        "preset": plan.preset.as_dict(),
        # As they were when it began.
        "data": {**plan.arguments["data"], "limit": plan.limit, "measured_sha256": text_checksum(digests)},
        "seed": plan.seed,
        "intervals": {"method": "percentile bootstrap over samples", "level": LEVEL, "resamples": RESAMPLES},
        "meanings": {name: column.meaning for name, column in COLUMNS.items() if name in shown},
        "systems": {
            system.name: {"role": system.role, **system.facts()}
            for system in plan.systems
            if any(system.name in rows for rows in kinds.values())
        },
        "samples": {kind: count for kind, count in counts.items() if count},
        "kinds": kinds,
        "left_out": {"samples": len(measurement.left_out), "reasons": measurement.left_out},
        "notes": [
            *(*notes, *_warnings(kinds), *_unanswered(plan, measurement, kinds)),
            *(*_not_handled(measurement), *_of_fewer(kinds)),
        ],
    }
    return dict(printable(results))


def write_results(out: Path, results: Results, measurement: Measurement) -> None:
    """Write results.json and samples.jsonl, each whole or not at all."""
    figures = {row: records.samples() for row, records in measurement.records.items()}
    with atomic_path(out / SAMPLES) as temporary, temporary.open("w", encoding="utf-8") as file:
        for sample, known in measurement.known.items():
            systems = {system: found[sample] for (_, system), found in figures.items() if sample in found}
            line = {"id": sample, "kind": known.kind, "sha256": known.sha256, "label": known.label, "systems": systems}
            file.write(json.dumps(printable(line)) + "\n")
        for sample, reason in measurement.left_out.items():
            file.write(json.dumps(printable({"id": sample, "left_out": reason})) + "\n")
    with atomic_path(out / RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _of_kind(plan: Plan, measurement: Measurement, kind: Kind) -> dict[str, Any]:
    """Rows of the table of a kind, by system."""
    rows: dict[str, Any] = {}
    for system in plan.systems:
        row = kind, system.name
        found: dict[str, Any] = {"samples": 0, "figures": {}}
        if row in measurement.records:
            records = measurement.records[row]
            found["samples"] = len(records)
            found["figures"] = _figures(records, plan.seed)
        distances = [meter.result() for key, meter in measurement.meters.items() if key[:2] == row and _enough(meter)]
        if distances:
            found["frechet"] = distances
            found["figures"] |= {
                one["distance"]: {"value": one["value"], "low": None, "high": None, "n": min(one["samples"])}
                for one in distances
            }
        if row in measurement.vectors:
            found |= _understanding(plan, measurement, kind, system.name)
            for part in ("zero_shot", "retrieval"):
                found["figures"] |= found.get(part, {}).get("figures", {})
            found["samples"] = max(found["samples"], len(measurement.vectors[row]))
        if row in measurement.not_handled:
            found["not_handled"] = measurement.not_handled[row]
        if found["figures"]:
            found["figures"] = {name: found["figures"][name] for name in COLUMNS if name in found["figures"]}
            rows[system.name] = found
    return rows


def _figures(records: Records, seed: int) -> dict[str, Any]:
    figures = {name: asdict(interval) for name, interval in records.summary(seed).figures.items()}
    if "pixels" in figures:
        bits, pixels = (list(records.values(name).values()) for name in ("bits", "pixels"))
        figures["bits_per_pixel"] = asdict(bootstrap_ratio(bits, pixels, seed))
        del figures["pixels"], figures["bits"]
    peak = max(records.values("memory_mb").values())
    figures["memory_mb"] = {"value": peak, "low": None, "high": None, "n": len(records)}
    return figures


def _understanding(plan: Plan, measurement: Measurement, kind: Kind, system: str) -> dict[str, Any]:
    vectors, known = measurement.vectors[kind, system], measurement.known
    tower, tasks = plan.alignments[system].tower, plan.preset.tasks
    found: dict[str, Any] = {}
    if "zero-shot" in tasks:
        labels = {sample: known[sample].label for sample in vectors}
        found["zero_shot"] = zero_shot(vectors, labels, plan.labels, tower, plan.prompts or PROMPTS[kind], plan.seed)
    if "retrieval" in tasks:
        captions = {sample: known[sample].captions for sample in vectors}
        found["retrieval"] = retrieval(vectors, captions, tower, plan.seed)
    return {name: part for name, part in found.items() if part is not None}


def _warnings(kinds: Mapping[Kind, Any]) -> list[str]:
    """Of Fréchet distances, each once."""
    found = [
        f"{one['distance']} ({kind}): {one['warning']}"
        for kind, rows in kinds.items()
        for row in rows.values()
        for one in row.get("frechet", [])
        if one["warning"]
    ]
    return list(dict.fromkeys(found))


def _unanswered(plan: Plan, measurement: Measurement, kinds: Mapping[Kind, Any]) -> list[str]:
    """Tasks that the data cannot answer for models that could."""
    needs = {
        "zero-shot": ("zero_shot", "two classes (folders, or those that --labels names)"),
        "retrieval": ("retrieval", "two samples with captions (NAME.txt beside them, or --captions)"),
    }
    return [
        f"no {task} of {system} ({kind}): it needs at least {what}"
        for kind, system in measurement.vectors
        for task, (key, what) in needs.items()
        if task in plan.preset.tasks and key not in kinds.get(kind, {}).get(system, {})
    ]


def _not_handled(measurement: Measurement) -> list[str]:
    """One line for each baseline that some samples were measured without."""
    lines = []
    for (kind, system), reasons in measurement.not_handled.items():
        shown = [f"{sample} ({reason})" for sample, reason in list(reasons.items())[:LISTED]]
        more = [f"and {len(reasons) - LISTED} more"] if len(reasons) > LISTED else []
        lines.append(f"{system} ({kind}) is measured without what it cannot code: {', '.join(shown + more)}")
    return lines


def _of_fewer(kinds: Mapping[Kind, Any]) -> list[str]:
    """Figures of fewer samples than their rows count, such as SSIM where some pictures are too small for its window."""
    found = [
        f"{COLUMNS[name].title} ({kind}) is of {figure['n']} of {row['samples']} samples: {_WHY[name]}"
        for kind, rows in kinds.items()
        for row in rows.values()
        for name, figure in row["figures"].items()
        if name in _WHY and figure["n"] < row["samples"]
    ]
    return list(dict.fromkeys(found))


def _enough(meter: Any) -> bool:
    return bool(min(meter.originals.count, meter.copies.count) >= 2)


def shown_value(name: str, figure: Mapping[str, Any], *, interval: bool = True) -> str:
    """A figure as tables write it: "28.44 [26.10, 30.51]"."""
    digits = COLUMNS[name].digits
    text = f"{figure['value']:,.{digits}f}"
    if interval and figure["low"] is not None and name not in ("tokens", "bits", "encode_seconds", "decode_seconds"):
        text += f" [{figure['low']:,.{digits}f}, {figure['high']:,.{digits}f}]"
    return text


def columns_of(rows: Mapping[str, Any]) -> list[str]:
    """Names of the figures that a table of these rows shows."""
    return [name for name in COLUMNS if any(name in row["figures"] for row in rows.values())]


def best_rows(name: str, rows: Mapping[str, Any]) -> set[str]:
    """Systems with the best value of a figure, where more than one has it and better is known."""
    values = {system: row["figures"][name]["value"] for system, row in rows.items() if name in row["figures"]}
    better = COLUMNS[name].better
    if len(values) < 2 or not better:
        return set()
    best = max(better * value for value in values.values())
    return {system for system, value in values.items() if math.isclose(better * value, best)}
