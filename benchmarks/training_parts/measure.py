"""From subjects to figures: what takes turns, what is divided by what."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.machine import matrix_products, seconds_in_turns
from benchmarks.training_parts.subjects import EngineName, Precision, Setting, Specs, Subject, Times
from tokenizer.errors import InputError
from tokenizer.training.curriculum.flops import Count

GOAL = 0.7
"""Of the matrix-product rate, on a CPU."""

Pair = tuple[EngineName, Precision]
Record = dict[str, Any]


def groups_of(engines: Sequence[EngineName], precision: Precision, *, fp8: Sequence[EngineName]) -> list[list[Pair]]:
    """Which engines and precisions take turns. What is compared is in one group, and few models are held at once.

    Args:
        engines: in `precision`. fp8: those that can FP8, besides; it is compared with bf16.
    """
    groups: list[list[Pair]] = [[(engine, precision), (engine, "fp8")] for engine in fp8]
    if len(engines) > 1 or not groups:
        groups.append([(engine, precision) for engine in engines])
    return groups


def measure_apart(pairs: Sequence[Pair], setting: Setting, steps: int, specs: Specs = "local") -> list[Record]:
    """As `measure`, one model after the other, for a GPU that cannot hold two; each takes turns with the products."""
    records = []
    for pair in pairs:
        records += measure([pair], setting, steps, specs)
        forget_models(setting.device)
        records[-1]["beside the first"] = records[0]["seconds"] / records[-1]["seconds"]
    return records


def forget_models(device: torch.device) -> None:
    """Engines hold themselves by their hooks; the next group needs their memory, in one piece."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(pairs: Sequence[Pair], setting: Setting, steps: int, specs: Specs = "local") -> list[Record]:
    """Step all of a group in turns with as much work of matrix products; one record each, compared with the first.

    The matrix products are in the group's first precision: FP8 is seen beside what bf16 could do.

    Raises:
        InputError: a group that does not fit the GPU's memory.
    """
    try:
        subjects = [Subject(engine, precision, setting, specs) for engine, precision in pairs]
        dtype = torch.float32 if pairs[0][1] == "fp32" else torch.bfloat16
        products, product_work = matrix_products(setting.device, dtype, subjects[0].work.total)
        calls: list[Callable[[], object]] = [products, *(subject.step for subject in subjects)]
        product_time, *_ = seconds_in_turns(calls, setting.device, steps)
    except torch.OutOfMemoryError:
        names = " and ".join(f"{engine} {precision}" for engine, precision in pairs)
        raise InputError(
            f"{names} do not fit the memory of this GPU together; give fewer --tokens or --apart"
        ) from None
    rate = product_work / product_time
    return [
        {
            "engine": subject.engine,
            "precision": subject.precision,
            **figures(subject.best, subject.work, subject.tokens, rate),
            "GiB": None if subject.peak is None else subject.peak / 2**30,
            "beside the first": subjects[0].best.whole / subject.best.whole,
        }
        for subject in subjects
    ]


def figures(times: Times, work: Count, tokens: int, rate: float) -> Record:
    """Rates of a step, and fractions of the matrix-product rate `rate` in operations a second.

    "ratio" counts all products of the model, "without attention" those with weights alone over the same time, "passes"
    those of forward and backward over their time alone.
    """
    return {
        "tokens": tokens,
        "seconds": times.whole,
        "passes seconds": times.passes,
        "update seconds": times.update,
        "tokens/s": tokens / times.whole,
        "GFLOP": work.total / 1e9,
        "attention GFLOP": work.attention / 1e9,
        "matrix GFLOP/s": rate / 1e9,
        "ratio": work.total / times.whole / rate,
        "ratio without attention": work.weights / times.whole / rate,
        "ratio of passes": work.total / times.passes / rate,
        "tokens for the goal": tokens_for(GOAL, times, work, tokens, rate),
    }


def tokens_for(goal: float, times: Times, work: Count, tokens: int, rate: float) -> int | None:
    """Tokens of a step whose ratio is `goal`, if passes cost what they do a token and an update what it does a step.

    From goal = n w / (n p + u) / rate with w operations and p seconds a token, and u seconds an update. None where the
    passes alone are slower than that.
    """
    spare = work.total / (goal * rate) - times.passes
    return math.ceil(tokens * times.update / spare) if spare > 0 else None


def has_bfloat16(device: torch.device, size: int = 256) -> bool:
    """Whether bfloat16 products are worth something here: processors without instructions for them take 100 times as
    long as in float32, and a benchmark would take hours."""
    a = torch.ones(size, size, device=device)
    calls: list[Callable[[], object]] = [lambda x=x: torch.mm(x, x) for x in (a, a.bfloat16())]  # type: ignore[misc]
    single, half = seconds_in_turns(calls, device, 2)
    return half < 4 * single
