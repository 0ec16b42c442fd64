"""Fashion-MNIST: 70,000 labelled grey pictures of 28 x 28, with the split they were published with."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.shards.writer import Record
from data.sources.packages import FASHION, install_hint
from data.sources.sets import OpenSet, Options, Plan, Split, pieces, record
from tokenizer.errors import InputError

LABELS = (
    "t-shirt or top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
PER_SHARD = 2500
_PREFIX: dict[Split, str] = {"train": "train", "evaluation": "t10k"}
_UINT8 = 8  # code of unsigned bytes in the third byte of an IDX file


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes, compressed with gzip.

    The file begins with two zeros, the code of its type and the number of axes; then follow the sizes as big-endian
    32-bit integers, and the values.

    Raises:
        InputError: damaged, or something else.
    """
    try:
        data = gzip.decompress(path.read_bytes())
        axes = data[3]
        shape = tuple(int(size) for size in np.frombuffer(data, ">u4", axes, 4))
        if data[:3] != bytes([0, 0, _UINT8]):
            raise ValueError("not an IDX file of bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}): install {FASHION.name} again") from None


@lru_cache(maxsize=1)  # a worker makes several shards of the same file
def _read(pictures: Path, labels: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    read = read_idx(pictures), read_idx(labels)
    if read[0].ndim != 3 or read[1].shape != read[0].shape[:1] or (read[1] >= len(LABELS)).any():
        raise InputError(f"{pictures}: pictures {read[0].shape} and labels {read[1].shape} do not belong together")
    return read


@dataclass(frozen=True, slots=True)
class _Job:
    split: Split
    pictures: Path
    labels: Path
    numbers: tuple[int, ...]


def _make(job: _Job) -> Iterator[Record]:
    pictures, labels = _read(job.pictures, job.labels)
    for number in job.numbers:
        png = io.BytesIO()
        Image.fromarray(pictures[number]).save(png, "PNG")
        label = LABELS[labels[number]]
        facts = {"label": label, "number": number, "licence": FASHION.licence, "source": FASHION.name}
        yield record(f"{job.split}-{number:05d}", {"png": png.getvalue()}, label, **facts)


def _plan(options: Options) -> Plan:
    SET.require()
    files = {path.name: path for path in FASHION.files() or []}
    jobs: dict[Split, list[_Job]] = {}
    for split, prefix in _PREFIX.items():
        try:
            pictures, labels = files[f"{prefix}-images-idx3-ubyte.gz"], files[f"{prefix}-labels-idx1-ubyte.gz"]
        except KeyError as error:
            raise InputError(f"{FASHION.name} lacks {error}: {install_hint([FASHION])}") from None
        # In the order they were published in, which is mixed already.
        numbers = range(len(_read(pictures, labels)[0]))[: options.limit]
        jobs[split] = [_Job(split, pictures, labels, piece) for piece in pieces(numbers, PER_SHARD)]
    return Plan(jobs, _make, 1, LABELS)


SET = OpenSet(
    name="fashion",
    kind="images",
    size="70,000 grey pictures of 28 x 28, 230 MB",
    licence=FASHION.licence,
    citation="Xiao, Rasul, Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms "
    "(arXiv:1708.07747)",
    packages=(FASHION,),
    captions="captions and labels: 10 kinds of clothes",
    split="as published: 60,000 for training, 10,000 for evaluation",
    plan=_plan,
)
