"""Everything that is counted, and its state in one file.

Figures, feature statistics and vectors of a group of samples are added together and saved together, so that whatever
ends a run, the file never knows a sample by half.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError
from tokenizer.evaluation.accumulate import Records
from tokenizer.evaluation.command.names import printable
from tokenizer.evaluation.command.presets import Kind
from tokenizer.evaluation.features import FrechetMeter, Provenance
from tokenizer.tensorio import write_safetensors

Row = tuple[Kind, str]
"""Kind of samples, name of a system."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is kept of a sample beside its figures. number: in its source."""

    kind: Kind
    number: int
    sha256: str
    label: str | None = None
    captions: tuple[str, ...] = ()


@dataclass(slots=True)
class Found:
    """What one system gave for one sample. features: by network, rows [width] of original and copy; not_handled: why it
    cannot take it, and then there is nothing else."""

    figures: dict[str, float] = field(default_factory=dict)
    features: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    vector: Tensor | None = None
    not_handled: str | None = None


class Measurement:
    """Figures of all samples and systems so far.

    Args:
        networks: what Fréchet distances are computed over, by name.
    """

    def __init__(self, networks: Mapping[str, Provenance]) -> None:
        self._networks = dict(networks)
        self.records: dict[Row, Records] = {}
        self.meters: dict[tuple[Kind, str, str], FrechetMeter] = {}
        self.vectors: dict[Row, dict[str, Tensor]] = {}
        self.known: dict[str, Known] = {}
        self.left_out: dict[str, str] = {}
        self.not_handled: dict[Row, dict[str, str]] = {}
        self.done = 0

    def add(self, sample: str, known: Known, found: Mapping[str, Found]) -> None:
        """Add a measured sample: what each system gave.

        Raises:
            InputError: a figure or feature is not finite. Nothing has been added then.
        """
        assert not self.has(sample), f"{sample}: added twice"
        for system, one in found.items():
            Records().add(f"{sample}, {system}", one.figures)
            rows = [row for pair in one.features.values() for row in pair]
            if not all(bool(row.isfinite().all()) for row in [*rows, *([] if one.vector is None else [one.vector])]):
                raise InputError(f"{sample}, {system}: a feature is not finite")
        self.known[sample] = known
        for system, one in found.items():
            row = known.kind, system
            if one.not_handled is not None:
                self.not_handled.setdefault(row, {})[sample] = one.not_handled
            if one.figures:
                self.records.setdefault(row, Records()).add(sample, one.figures)
            for name, (original, copy) in one.features.items():
                meter = self.meters.setdefault((*row, name), FrechetMeter(self._networks[name]))
                meter.add(original[None], copy[None])
            if one.vector is not None:
                self.vectors.setdefault(row, {})[sample] = one.vector

    def has(self, sample: str) -> bool:
        """Whether a sample was measured or left out."""
        return sample in self.known or sample in self.left_out

    def merge(self, other: Measurement) -> None:
        """Add the samples of another process.

        Raises:
            InputError: one of them is here already.
        """
        for sample in (*other.known, *other.left_out):
            self.refuse_repeated(sample)
        for row, records in other.records.items():
            self.records.setdefault(row, Records()).merge(records)
        for key, meter in other.meters.items():
            mine = self.meters.setdefault(key, FrechetMeter(meter.provenance))
            mine.originals.merge(meter.originals)
            mine.copies.merge(meter.copies)
        for row, vectors in other.vectors.items():
            self.vectors.setdefault(row, {}).update(vectors)
        for row, reasons in other.not_handled.items():
            self.not_handled.setdefault(row, {}).update(reasons)
        self.known.update(other.known)
        self.left_out.update(other.left_out)
        self.done += other.done

    def refuse_repeated(self, sample: str) -> None:
        """Raise `InputError` if a sample of this name is here: of two, one would be lost."""
        if self.has(sample):
            raise InputError(f"two samples are called '{printable(sample)}': the source must tell them apart")

    def gathered(self) -> Measurement:
        """The samples of all processes together, in the order of their numbers; in every process."""
        together = Measurement(self._networks)
        states = [self.state()]
        if dist.is_available() and dist.is_initialized():
            states = [{} for _ in range(dist.get_world_size())]  # type: ignore[misc]
            dist.all_gather_object(states, self.state())
        for tensors, document in states:
            part = Measurement(self._networks)
            part.restore(tensors, document)
            together.merge(part)
        together.known = dict(sorted(together.known.items(), key=lambda entry: entry[1].number))
        together.left_out = dict(sorted(together.left_out.items()))
        order = {sample: number for number, sample in enumerate(together.known)}
        for row, vectors in together.vectors.items():
            together.vectors[row] = dict(sorted(vectors.items(), key=lambda entry: order[entry[0]]))
        return together

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON, from which `restore` goes on."""
        tensors: dict[str, Tensor] = {}
        for number, meter in enumerate(self.meters.values()):
            tensors |= {f"meter{number}.{name}": value for name, value in meter.state().items()}
        for number, vectors in enumerate(self.vectors.values()):
            tensors |= {f"vector{number}.{place}": vector for place, vector in enumerate(vectors.values())}
        document = {
            "done": self.done,
            "left_out": self.left_out,
            "known": {
                sample: [one.kind, one.number, one.sha256, one.label, list(one.captions)]
                for sample, one in self.known.items()
            },
            "records": [[*row, records.state()] for row, records in self.records.items()],
            "not_handled": [[*row, reasons] for row, reasons in self.not_handled.items()],
            "meters": [list(key) for key in self.meters],
            "vectors": [[*row, list(vectors)] for row, vectors in self.vectors.items()],
        }
        return tensors, document

    def restore(self, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            InputError: it is not such a state.
        """
        try:
            self.done, self.left_out = int(document["done"]), dict(document["left_out"])
            self.known = {
                sample: Known(kind, int(number), digest, label, tuple(captions))
                for sample, (kind, number, digest, label, captions) in document["known"].items()
            }
            self.records = {(kind, system): Records.from_state(part) for kind, system, part in document["records"]}
            self.not_handled = {(kind, system): dict(reasons) for kind, system, reasons in document["not_handled"]}
            for number, (kind, system, name) in enumerate(document["meters"]):
                meter = FrechetMeter(self._networks[name])
                meter.restore(_below(tensors, f"meter{number}."))
                self.meters[kind, system, name] = meter
            for number, (kind, system, samples) in enumerate(document["vectors"]):
                rows = _below(tensors, f"vector{number}.")
                self.vectors[kind, system] = {sample: rows[str(place)] for place, sample in enumerate(samples)}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the state of the evaluation is damaged ({error}): delete it and start anew") from None


def save_state(path: Path, measurement: Measurement, arguments: Mapping[str, Any]) -> None:
    """Write everything to one file, whole or not at all."""
    tensors, document = measurement.state()
    text = json.dumps({"arguments": arguments, "state": document})
    with atomic_path(path) as temporary:
        write_safetensors({name: value.contiguous() for name, value in tensors.items()}, temporary, {"state": text})


def load_state(path: Path, measurement: Measurement, arguments: Mapping[str, Any]) -> bool:
    """Go on from a file of `save_state`; False where there is none.

    Raises:
        InputError: it is damaged, or of a run with other arguments.
    """
    if not path.is_file():
        return False
    opener: Any = safe_open  # safetensors ships no types for what it returns
    try:
        with opener(str(path), framework="pt") as file:
            saved = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged ({' '.join(str(error).split())}): delete it and start anew") from None
    refuse_other_arguments(path.parent.parent, saved.get("arguments"), arguments)
    measurement.restore(tensors, saved["state"])
    return True


def refuse_other_arguments(folder: Path, earlier: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `InputError` if an evaluation in `folder` was made with other arguments."""
    given = json.loads(json.dumps(arguments))
    if earlier == given:
        return
    known = earlier if isinstance(earlier, dict) else {}
    changed = [key for key in {**known, **given} if known.get(key) != given.get(key)]
    raise InputError(
        f"--out {folder}: holds an evaluation with other arguments ({', '.join(changed)}); choose another folder, or "
        "delete it"
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def chosen_samples(values: Mapping[str, float], names: Sequence[str] = ("best", "median", "worst")) -> dict[str, str]:
    """Samples with the largest, middle and smallest value, by what they are called; fewer where there are fewer."""
    order = sorted(values, key=lambda sample: (-values[sample], sample))
    places = {name: round(place * (len(order) - 1)) for name, place in zip(names, (0, 0.5, 1), strict=True)}
    found: dict[str, str] = {}
    for name, place in places.items():
        if order and order[place] not in found.values():
            found[name] = order[place]
    return found
