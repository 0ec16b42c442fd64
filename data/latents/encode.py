"""Items of one shard -> the records of its latents, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from data.batch import Batch
from data.latents.format import LatentItem, encode_latents
from data.latents.statistics import Moments
from data.mixture import Task
from data.names import file_name
from data.samples import LATENTS_EXTENSION, Fault, Item, Raw, SampleError
from data.shards.manifest import Skipped
from data.shards.tarwriter import KEYS, Record, is_key
from data.urls import UNREACHABLE
from data.window import Decode, Outcome
from tokenizer import AToken, SparseTokens
from tokenizer.errors import InputError
from tokenizer.patches import VisualSize
from tokenizer.voxels import AssetSize

_FASTEST = 1e6
"""Frames per second; what says more says nothing."""


@dataclass(frozen=True, slots=True)
class Untouched:
    """Decodes, but keeps caption and facts as they are in the shard: they are cleaned when the latents are read."""

    decode: Decode

    def __call__(self, raw: Raw, epoch: int) -> Item:
        """As `decode`; raises the same."""
        item = self.decode(raw, epoch)
        facts, label = raw.facts(), raw.label()
        if label is not None and facts.get("label") is None:  # it lay in a file of its own
            facts = {**facts, "label": label}
        return replace(item, caption=raw.caption(), facts=facts)


@dataclass(slots=True)
class ShardEncoder:
    """What becomes of the samples of one shard.

    model: on its device. Everything is computed in its precision.
    fingerprint: of its latent space.
    task: of the items.
    discrete: store indices.
    budget: tokens of a batch, at most; a larger item is a batch of its own.
    on_fault: called with every sample that is left out.
    on_batch: called with the numbers of samples and tokens of every batch.
    moments: of all latents so far; None before the first, and for indices.
    tokens: so far.
    """

    model: AToken
    fingerprint: str
    task: Task
    discrete: bool
    budget: int
    on_fault: Callable[[Fault], None]
    on_batch: Callable[[int, int], None]
    moments: Moments | None = None
    tokens: int = 0
    _keys: set[str] = field(default_factory=set)

    def records(self, outcomes: Iterable[Outcome]) -> Iterator[Record | Skipped]:
        """Records of the samples, in their order, and what could not become one: what was broken, and samples of other
        makers whose key a shard cannot have, or has already.

        Raises:
            SampleError: "unreachable shard": it may be there later, so nothing is to be concluded from its absence.
            InputError: a batch that does not fit the memory of the device.
        """
        waiting: list[Item] = []
        tokens = 0
        for outcome in outcomes:
            if isinstance(outcome, Fault):
                yield self._left_out(outcome)
                continue
            if problem := self._problem_of_key(outcome):
                yield self._left_out(_fault(outcome, problem))
                continue
            if waiting and tokens + outcome.tokens > self.budget:
                yield from self._encoded(waiting)
                waiting, tokens = [], 0
            waiting.append(outcome)
            tokens += outcome.tokens
        if waiting:
            yield from self._encoded(waiting)

    def _problem_of_key(self, item: Item) -> SampleError | None:
        """Why a sample cannot be written under its key; from now on the key is taken."""
        _, _, key = item.id.partition("/")
        if not is_key(key):
            return SampleError("impossible key", f"{item.id}: {KEYS}")
        if key in self._keys:
            return SampleError("repeated key", f"{item.id}: there is another sample of this key in its shard")
        self._keys.add(key)
        return None

    def _left_out(self, fault: Fault) -> Skipped:
        if fault.cause == UNREACHABLE:
            raise SampleError(fault.cause, fault.detail)
        self.on_fault(fault)
        return Skipped(f"{file_name(fault.shard)}/{fault.key or fault.index}", f"{fault.cause}: {fault.detail}")

    def _encoded(self, items: list[Item]) -> Iterator[Record | Skipped]:
        # The model never mixes items, so their order in batches changes nothing but, at most, the last bits.
        for item, latents in zip(items, self._latents(items), strict=True):
            try:
                contents = encode_latents(latents, item.id)
            except SampleError as error:
                yield self._left_out(_fault(item, error))
                continue
            if latents.mean is not None and latents.logvar is not None:
                moments = Moments.of(latents.mean.half().numpy(), latents.logvar.half().numpy())
                self.moments = moments if self.moments is None else self.moments + moments
            self.tokens += len(latents.positions)
            files = {LATENTS_EXTENSION: contents}
            if item.caption is not None:
                files["txt"] = item.caption.encode("utf-8")
            yield Record(item.id.partition("/")[2], files, item.facts)
        self.on_batch(len(items), sum(item.tokens for item in items))

    def _latents(self, items: list[Item]) -> list[LatentItem]:
        batch = Batch(self.task, items)
        try:
            tokens = batch.tokens(self.model.device, self.model.dtype, self.model.config.patch_size)
            values, pooled = self._values(tokens)
        except torch.OutOfMemoryError:
            raise InputError(
                f"a batch of {len(items)} samples and {batch.num_tokens} tokens does not fit the memory of "
                f"{self.model.device}; lower --budget, or --max-side and --frames"
            ) from None
        offsets = tokens.offsets.tolist()
        found = []
        sizes: Sequence[VisualSize | AssetSize] = batch.sizes()
        for number, (item, size) in enumerate(zip(items, sizes, strict=True)):
            rows = slice(offsets[number], offsets[number + 1])
            parts = {name: value[rows] for name, value in values.items()}
            latents = LatentItem(
                positions=tokens.host_positions[rows],
                pooled=pooled[number],
                size=size,
                model=self.model.config.name,
                fingerprint=self.fingerprint,
                frame_rate=_frame_rate(item),
                **parts,
            )
            found.append(latents)
        return found

    @torch.inference_mode()
    def _values(self, tokens: SparseTokens) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Mean and log-variance, or indices, and pooled vectors, on the CPU."""
        encoding = self.model.encode(tokens)
        if self.discrete:
            assert encoding.indices is not None
            values = {"indices": encoding.indices.features}
        else:
            values = {"mean": encoding.posterior.mean.features, "logvar": encoding.posterior.logvar.features}
        return {name: value.cpu() for name, value in values.items()}, encoding.pooled.cpu()


def _fault(item: Item, error: SampleError) -> Fault:
    shard, _, key = item.id.partition("/")
    return Fault(error.cause, shard, -1, str(error), key=key)


def _frame_rate(item: Item) -> float:
    rate: Any = item.facts.get("fps", 0.0)
    is_clip = item.pixels is not None and item.pixels.ndim == 4
    # Whole numbers in JSON may be larger than a float can be.
    return float(rate) if is_clip and isinstance(rate, int | float) and 0 < rate < _FASTEST else 0.0
