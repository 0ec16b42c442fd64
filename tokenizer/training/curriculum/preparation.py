"""From the batches of a step to what an engine needs: patches on the device, texts of everyone, and what to divide by.

A step takes batches from the loader `accumulation` times in every process: its turns. Each of them gives one batch of a
task, or as many as a batch size needs. A step's loss does not depend on how its samples are spread: a term is the mean
over all its units (patches, pictures, items) of the step, in whatever process and micro-batch they are, and images are
compared with the texts of all. Texts are frozen, so they are encoded first, once, and gathered; counts are agreed on
before the first forward pass. Noise is drawn from the seed, the step and the number of the turn among all processes'
turns, so that two processes draw what one would that takes batches twice; further micro-batches of a task in a turn
add their number.

Engines exchange gradients or weights in each micro-batch (FSDP2, Megatron), so that all processes need as many of each
task in each turn: who has fewer splits its largest ones.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.losses.networks import ImageNetwork
from tokenizer.losses.pictures import squares
from tokenizer.losses.sigmoid import same_text, text_keys
from tokenizer.losses.similarity import gather_rows
from tokenizer.patches import PatchSize, tokens_to_pixels
from tokenizer.sparse import SparseTokens
from tokenizer.text.protocol import TextTower
from tokenizer.training.curriculum.processes import Processes
from tokenizer.training.curriculum.tasks import IMAGE_RECONSTRUCTION, IMAGE_UNDERSTANDING, is_understanding
from tokenizer.training.feeding import StepBatch, StepViews


@dataclass(frozen=True, slots=True)
class Totals:
    """Units of a task in the whole step, in all processes: tokens, items, pictures for the perceptual losses, views,
    items that an image network has seen."""

    tokens: float
    items: float
    pictures: float
    views: float
    taught: float = 0.0


class Latest:
    """Whose patches are on the device, and these: of all micro-batches of a step those of one."""

    def __init__(self) -> None:
        self.owner: Patches | None = None
        self.tokens: SparseTokens | None = None


class Patches:
    """The patches of a micro-batch, made when they are asked for: those of a whole step may not fit the device.

    Args:
        make: the patches [N, P] on the device, the same each time.
        latest: shared by those of which one at a time is kept.
    """

    def __init__(self, make: Callable[[], SparseTokens], latest: Latest | None = None) -> None:
        self._make, self._latest = make, latest or Latest()
        self._places: SparseTokens | None = None

    def tokens(self) -> SparseTokens:
        latest = self._latest
        if latest.owner is not self or latest.tokens is None:
            latest.owner = latest.tokens = None  # before there are others
            latest.tokens, latest.owner = self._make(), self
            if self._places is None:
                self._places = _without_features(latest.tokens)
        return latest.tokens

    def places(self) -> SparseTokens:
        """The same without features [N, 0], on the CPU; kept."""
        return self._places or _without_features(self.tokens())


def _without_features(tokens: SparseTokens) -> SparseTokens:
    return SparseTokens(torch.empty(tokens.num_tokens, 0), tokens.host_positions, tokens.lengths)


NOTHING = Totals(*[math.inf] * 5)
"""What sums of a micro-batch are divided by that counts for nothing."""


@dataclass(frozen=True, slots=True)
class Texts:
    """What the items of a batch are compared with, [b] items and [B] texts of the step.

    every: float32 [B, D], unit vectors. matches: bool [b, B]. teacher: [b, D], where distillation takes its scores
    from.
    """

    every: Tensor
    matches: Tensor
    teacher: Tensor | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """One micro-batch, ready for the model and the objective.

    task: its task. patches: of its items. ids: of these.
    share: how much the task counts in this step: the share of the turns that were its. One for the task of every step;
        zero for a micro-batch that is there only because other processes have one more.
    totals: what sums are divided by.
    texts: of understanding. views: of each item, of 3D reconstruction.
    taught: where a teacher is imitated: which items it has seen, int64 [n], and what it saw, float32 [n, D]; None where
        it has seen none.
    seed: of its noise.
    captions: of its items.
    """

    task: str
    patches: Patches
    ids: tuple[str, ...]
    share: float
    totals: Totals
    texts: Texts | None
    views: tuple[StepViews | None, ...]
    seed: int
    taught: tuple[Tensor, Tensor] | None = None
    captions: tuple[str | None, ...] = ()

    @property
    def tokens(self) -> SparseTokens:
        """Patches [N, P] on the device, made anew where another micro-batch's were asked for in between."""
        return self.patches.tokens()


@dataclass(frozen=True, slots=True)
class _Group:
    """The micro-batches of one task in one turn. place: of the task among those of the turn."""

    task: str
    turn: int
    place: int
    batches: list[StepBatch]


class Preparer:
    """Prepares steps; every process calls it with the same tasks.

    Args:
        processes: all of the run.
        device: where tensors are wanted.
        patch_size: of the model.
        tower: of texts; None where nothing is understood.
        teacher: an image tower trained with the text tower; without one an image's own text teaches
            (`tokenizer.losses.weights`).
        seed: of the run.
        perceptual_images: pictures of a micro-batch that the perceptual losses look at.
        imitated: numbers that an imitated network gives of a sample; None where none is imitated.
        bf16: the teacher computes in bfloat16 where it can, as the model does; an H100 has a tenth of the speed, and
            less, for float32.
    """

    def __init__(
        self,
        processes: Processes,
        device: torch.device,
        patch_size: PatchSize,
        tower: TextTower | None,
        teacher: ImageNetwork | None,
        seed: int,
        perceptual_images: int | None,
        imitated: int | None = None,
        *,
        bf16: bool = False,
    ) -> None:
        self.processes, self.device, self.patch_size = processes, device, patch_size
        self.tower, self.teacher = tower, teacher
        self.seed, self.perceptual_images, self.imitated = seed, perceptual_images, imitated
        self.bf16 = bf16

    def __call__(self, turns: Sequence[Sequence[StepBatch]], step: int) -> list[Prepared]:
        """The micro-batches of a step.

        Args:
            turns: what the loader gave, one entry for each time it was asked.
            step: number of the step, from 0.

        Raises:
            InputError: processes that were given different tasks, or of one copy different samples, or a batch
                without what its task needs.
        """
        groups = [group for number, turn in enumerate(turns) for group in _groups(turn, number)]
        self._check_tasks(groups, step)
        wanted = self._most([len(group.batches) for group in groups])
        groups = [
            replace(group, batches=in_parts(group.batches, number))
            for group, number in zip(groups, wanted, strict=True)
        ]
        prepared = self._prepared(groups, len(turns), step)
        found = []
        for group, number in zip(groups, wanted, strict=True):
            own = [next(prepared) for _ in group.batches]
            # Single items cannot be split: the last one goes through once more, and counts for nothing.
            found += [*own, *[replace(own[-1], share=0.0, totals=NOTHING)] * (number - len(own))]
        return found

    def _prepared(self, groups: Sequence[_Group], turns: int, step: int) -> Iterator[Prepared]:
        batches = [batch for group in groups for batch in group.batches]
        tasks = list(dict.fromkeys(group.task for group in groups))
        totals = self._totals(batches, tasks)
        texts = self._texts(batches, tasks)
        places = [(group, number) for group in groups for number in range(len(group.batches))]
        latest = Latest()
        for row, (batch, (group, number)) in enumerate(zip(batches, places, strict=True)):
            patches = Patches(partial(batch.tokens, self.device, torch.float32, self.patch_size), latest)
            turn = group.turn * self.processes.world + self.processes.rank
            yield Prepared(
                task=group.task,
                patches=patches,
                ids=tuple(item.id for item in batch.items),
                share=sum(other.task == group.task for other in groups) / turns,
                totals=totals[group.task],
                texts=self._with_teacher(batch, patches, texts.get(row)),
                views=tuple(item.views for item in batch.items),
                seed=stream_seed(self.seed, step, group.place, turn, *([number] if number else [])),
                taught=self._taught(batch),
                captions=tuple(item.caption for item in batch.items),
            )

    def _check_tasks(self, groups: Sequence[_Group], step: int) -> None:
        if not self.processes.many:
            return
        code = float(zlib.crc32(" ".join(f"{group.turn} {group.task}" for group in groups).encode()))
        if self.processes.largest(code) != -self.processes.largest(-code):
            raise InputError(f"in step {step} processes were given different tasks; give them loaders of one run")
        # Those of a copy read for themselves. One that could not read a sample is a sample ahead from then on.
        ids = [item.id for group in groups for batch in group.batches for item in batch.items]
        if not self.processes.alike(float(zlib.crc32(" ".join(ids).encode()))):
            raise InputError(
                f"in step {step} processes that hold a copy of the model together were given different samples, since "
                "one of them could not read some; start again to go on from the newest checkpoint"
            )

    def _most(self, counts: Sequence[int]) -> list[int]:
        """The largest of all processes' counts, number by number."""
        # One sum, in which every process has numbers of its own: there is no need to ask for each maximum.
        start, width = self.processes.rank * len(counts), self.processes.world * len(counts)
        own = [float(counts[place - start]) if 0 <= place - start < len(counts) else 0.0 for place in range(width)]
        every = self.processes.sum(own)
        return [int(max(every[place :: len(counts)])) for place in range(len(counts))]

    def _totals(self, batches: Sequence[StepBatch], tasks: Sequence[str]) -> dict[str, Totals]:
        counts = {task: [0.0] * 5 for task in tasks}
        for batch in batches:
            items = len(batch.items)
            pictures = min(items, self.perceptual_images or items) if batch.task == IMAGE_RECONSTRUCTION else 0
            views = sum(item.views is not None for item in batch.items)
            taught = sum(item.teacher is not None for item in batch.items)
            for place, count in enumerate((batch.num_tokens, items, pictures, views, taught)):
                counts[batch.task][place] += count
        summed = self.processes.sum([count for task in tasks for count in counts[task]])
        return {task: Totals(*summed[5 * place : 5 * place + 5]) for place, task in enumerate(tasks)}

    def _texts(self, batches: Sequence[StepBatch], tasks: Sequence[str]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """Of each micro-batch of understanding: own text vectors, all of its task in the step, and which match."""
        result = {}
        for task in filter(is_understanding, tasks):
            mine = {number: captions(batch) for number, batch in enumerate(batches) if batch.task == task}
            flat = [text for texts in mine.values() for text in texts]
            if self.tower is None:
                raise InputError(f"{task} needs a text tower; set text.tower")
            # Labels are the same for many: the tower reads each text once.
            places = {text: place for place, text in enumerate(dict.fromkeys(flat))}
            own = self.tower.encode(list(places)).to(self.device)[[places[text] for text in flat]]
            keys = text_keys(flat).to(self.device)
            every, _ = gather_rows(own, self.processes.group)
            every_keys, _ = gather_rows(keys, self.processes.group)
            start = 0
            for number, texts in mine.items():
                rows = slice(start, start + len(texts))
                result[number] = own[rows], every, same_text(keys[rows], every_keys)
                start += len(texts)
        return result

    def _taught(self, batch: StepBatch) -> tuple[Tensor, Tensor] | None:
        """See `Prepared.taught`.

        Raises:
            InputError: features of another network than the one that is imitated.
        """
        seen = [(row, item, item.teacher) for row, item in enumerate(batch.items) if item.teacher is not None]
        if self.imitated is None or not is_understanding(batch.task) or not seen:
            return None
        for _, item, features in seen:
            if features.shape != (self.imitated,):
                raise InputError(
                    f"{item.id}: its teacher has {len(features)} numbers, but choices.imitated_width is {self.imitated}"
                )
        rows = torch.tensor([row for row, _, _ in seen])
        return rows.to(self.device), torch.stack([features for _, _, features in seen]).to(self.device)

    def _with_teacher(
        self, batch: StepBatch, patches: Patches, texts: tuple[Tensor, Tensor, Tensor] | None
    ) -> Texts | None:
        if texts is None:
            return None
        own, every, matches = texts
        if batch.task != IMAGE_UNDERSTANDING:
            return Texts(every, matches, None)
        if self.teacher is None:
            return Texts(every, matches, own)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return Texts(every, matches, image_vectors(self.teacher, patches.tokens(), self.patch_size))


def _groups(turn: Sequence[StepBatch], number: int) -> list[_Group]:
    """The batches of a turn by task, in the order in which tasks first come."""
    found: dict[str, list[StepBatch]] = {}
    for batch in turn:
        found.setdefault(str(batch.task), []).append(batch)
    return [_Group(task, number, place, batches) for place, (task, batches) in enumerate(found.items())]


def in_parts(batches: Sequence[StepBatch], number: int) -> list[StepBatch]:
    """The same items in `number` batches, the largest split again and again; in fewer where each holds a single one."""
    parts = list(batches)
    while len(parts) < number:
        several = [place for place, part in enumerate(parts) if len(part.items) > 1]
        if not several:
            break
        largest = max(several, key=lambda place: parts[place].num_tokens)
        parts[largest : largest + 1] = parts[largest].split()
    return parts


def captions(batch: StepBatch) -> list[str]:
    """The captions of a batch.

    Raises:
        InputError: an item without one.
    """
    texts = []
    for item in batch.items:
        if not item.caption:
            raise InputError(
                f"{item.id}: has no caption, and {batch.task} needs one; set require_caption in its source"
            )
        texts.append(item.caption)
    return texts


@torch.no_grad()
def image_vectors(network: ImageNetwork, tokens: SparseTokens, patch_size: PatchSize) -> Tensor:
    """What a frozen image network says of stills [N, P], [B, D]; pictures of one size go through together.

    A network that takes one size alone gets squares of it.
    """
    pictures = [frames[0] for frames in tokens_to_pixels(tokens, None, patch_size)]
    if not getattr(network, "naflex", False):
        return network(squares(pictures, network.side))
    found: dict[int, Tensor] = {}
    sizes = [tuple(picture.shape[:2]) for picture in pictures]
    for size in dict.fromkeys(sizes):
        rows = [number for number, other in enumerate(sizes) if other == size]
        vectors = network(torch.stack([pictures[row] for row in rows]).permute(0, 3, 1, 2))
        found.update(zip(rows, vectors, strict=True))
    return torch.stack([found[number] for number in range(len(pictures))])


def stream_seed(*parts: int) -> int:
    """A seed of 63 bits that other parts do not share."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
