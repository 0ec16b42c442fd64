"""The loop: samples in, a measurement out. What was measured is saved now and then, and a run goes on from there.

A sample counts for all systems or for none: if one of them cannot take it, it is left out with the reason, so that
every row of a table is about the same samples. (A baseline that is not meant for a sample is no failure, nor is one
that has no way to code it, such as WebP for very wide pictures: the sample is measured without it, and a note says so.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tokenizer.errors import InputError
from tokenizer.evaluation.accumulate import shard
from tokenizer.evaluation.command.datasets import RawSample, Source, fault_line
from tokenizer.evaluation.command.measurement import Found, Known, Measurement, load_state, save_state
from tokenizer.evaluation.command.names import printable
from tokenizer.evaluation.command.presets import Kind, Preset
from tokenizer.evaluation.command.processes import Processes
from tokenizer.evaluation.command.samples import Sample, load_sample
from tokenizer.evaluation.command.systems import ATokenSystem, NotHandledError, System
from tokenizer.evaluation.command.understanding import TextAlignment, sample_vector
from tokenizer.evaluation.features import I3D_MIN_FRAMES, FeatureNetwork
from tokenizer.evaluation.metrics import PairMetrics

GROUP: Final = 8
"""Pictures that are measured together; clips and assets are measured one by one."""

SAVE_SECONDS: Final = 30.0
"""Between two states on the disk."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    source, preset: see there. systems: models first, since baselines spend their bits.
    metrics: of pairs; figures: which of them are kept.
    networks: of Fréchet distances, by the kind of samples they measure.
    alignments: of the systems that understand, by name.
    labels: names of classes in words; None for the classes as they are called.
    prompts: around the names of classes; empty for those of the kind of sample.
    limit: at most so many samples, from the first. seed: of bootstraps.
    arguments: what a resumed run must have in common with the first.
    """

    source: Source
    preset: Preset
    systems: Sequence[System]
    metrics: PairMetrics
    figures: frozenset[str]
    networks: Mapping[Kind, Sequence[FeatureNetwork]] = field(default_factory=dict)
    alignments: Mapping[str, TextAlignment] = field(default_factory=dict)
    labels: Mapping[str, str] | None = None
    prompts: Sequence[str] = ()
    limit: int | None = None
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numbers(self) -> range:
        """Of all samples of the run."""
        count = len(self.source)
        return range(count if self.limit is None else min(count, self.limit))

    def measurement(self) -> Measurement:
        """An empty one."""
        used = [network for networks in self.networks.values() for network in networks]
        return Measurement({network.provenance.network: network.provenance for network in used})


class Runner:
    """Measures the share of one process.

    Args:
        plan: see there.
        out: folder for the state.
        processes: which share of how many.
        on_sample: called after each sample, with how many are done.
        on_fault: called with a line for each sample that is left out.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        processes: Processes = Processes(),  # noqa: B008 - frozen
        on_sample: Callable[[int], object] = lambda _: None,
        on_fault: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.plan, self._on_sample, self._on_fault = plan, on_sample, on_fault
        self.numbers = shard(plan.numbers, processes.rank, processes.world)
        self.state_file = out / "state" / f"process-{processes.rank}.safetensors"
        self.measurement = plan.measurement()
        self._whole = True

    def run(self) -> Measurement:
        """Measure what is left of the share, and return all of it.

        Raises:
            InputError: a state that cannot be used.
        """
        if load_state(self.state_file, self.measurement, self.plan.arguments):
            self._on_sample(self.measurement.done)
        saved = time.monotonic()
        try:
            for group in self._groups(self.numbers[self.measurement.done :]):
                self._measure(group)
                self._on_sample(self.measurement.done)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()
        finally:
            # Also when interrupted, unless that came in the middle of adding a group.
            if self._whole:
                self._save()
        return self.measurement

    def _save(self) -> None:
        save_state(self.state_file, self.measurement, self.plan.arguments)

    def _groups(self, numbers: Sequence[int]) -> Iterator[list[tuple[int, RawSample]]]:
        """Pictures in eights, others alone, in order."""
        group: list[tuple[int, RawSample]] = []
        for number, raw in zip(numbers, self.plan.source.read(numbers), strict=True):
            if group and (raw.kind != "image" or len(group) == GROUP):
                yield group
                group = []
            group.append((number, raw))
            if raw.kind != "image":
                yield group
                group = []
        if group:
            yield group

    def _measure(self, group: list[tuple[int, RawSample]]) -> None:
        faults: dict[str, str] = {}
        samples: dict[int, Sample] = {}
        self._check_names([raw.id for _, raw in group])
        for number, raw in group:
            try:
                samples[number] = load_sample(raw, self.plan.preset)
            except Exception as error:  # one odd file must not end a run, and end it again whenever it is resumed
                faults[raw.id] = fault_line(error)
        found = self._all_systems(samples, faults)
        self._whole = False
        for number, sample in samples.items():
            if sample.id in faults:
                continue
            # Text towers read UTF-8 alone, and a class may be called by a folder that is not.
            words = tuple(printable(caption) for caption in sample.captions)
            known = Known(sample.kind, number, sample.sha256, printable(sample.label), words)
            try:
                self.measurement.add(sample.id, known, found[sample.id])
            except InputError as error:
                faults[sample.id] = fault_line(error)
        self.measurement.left_out.update(faults)
        self.measurement.done += len(group)
        self._whole = True
        for name, reason in faults.items():
            self._on_fault(printable(reason if name in reason else f"{name}: {reason}"))

    def _check_names(self, names: Sequence[str]) -> None:
        """Raise `InputError` unless each name is that of one sample of this process alone."""
        for place, name in enumerate(names):
            if name in names[:place]:
                raise InputError(f"two samples are called '{printable(name)}': the source must tell them apart")
            self.measurement.refuse_repeated(name)

    def _all_systems(self, samples: Mapping[int, Sample], faults: dict[str, str]) -> dict[str, dict[str, Found]]:
        """What each system gives for each sample; samples that one of them refuses become faults."""
        found: dict[str, dict[str, Found]] = {sample.id: {} for sample in samples.values()}
        left = list(samples.values())
        if not left:
            return found
        networks = [one for one in self.plan.networks.get(left[0].kind, ()) if _sees(one, left[0])]
        reconstructed = "reconstruction" in self.plan.preset.tasks
        frames = [sample.frames for sample in left]
        originals = {
            network.provenance.network: dict(zip((sample.id for sample in left), network.measure(frames), strict=True))
            for network in (networks if reconstructed else [])
        }
        for system in self.plan.systems:
            if reconstructed:
                left = self._reconstruct(system, left, found, networks, originals, faults)
            alignment = self.plan.alignments.get(system.name)
            if alignment is not None and isinstance(system, ATokenSystem):
                for sample in left:
                    vector = sample_vector(system, alignment, sample)
                    found[sample.id].setdefault(system.name, Found()).vector = vector
        return found

    def _reconstruct(
        self,
        system: System,
        samples: Sequence[Sample],
        found: dict[str, dict[str, Found]],
        networks: Sequence[FeatureNetwork],
        originals: Mapping[str, Mapping[str, Any]],
        faults: dict[str, str],
    ) -> list[Sample]:
        """Add what one system gives to `found`; returns the samples that are still whole."""
        left, pairs = [], []
        for sample in samples:
            if not system.handles(sample):
                left.append(sample)
                continue
            budget = None
            if system.budget_of is not None:
                budget = found[sample.id][system.budget_of].figures["bits"]
            try:
                pairs.append((sample, system.reconstruct(sample, budget)))
            except NotHandledError as error:
                found[sample.id][system.name] = Found(not_handled=fault_line(error))
                left.append(sample)
            except InputError as error:
                faults[sample.id] = f"{system.name}: {fault_line(error)}"
            except Exception as error:
                # Ends the run: a device that failed would leave out all that follows, and the run would look done.
                raise InputError(
                    f"{printable(sample.id)}: {system.name} failed: {fault_line(error)} (ATOKEN_DEBUG=1 shows where)"
                ) from error
            else:
                left.append(sample)
        if not pairs:
            return left
        copies = [copy.frames for _, copy in pairs]
        likeness = self.plan.metrics.measure([sample.frames for sample, _ in pairs], copies)
        features = {network.provenance.network: network.measure(copies) for network in networks}
        for number, (sample, copy) in enumerate(pairs):
            kept = {name: value for name, value in likeness[number].items() if name in self.plan.figures}
            rows = {name: (originals[name][sample.id], features[name][number]) for name in features}
            found[sample.id][system.name] = Found({**kept, **copy.figures(sample)}, rows)
        return left


def _sees(network: FeatureNetwork, sample: Sample) -> bool:
    """Whether a clip is long enough for a network."""
    return network.provenance.network != "i3d" or len(sample.frames) >= I3D_MIN_FRAMES
