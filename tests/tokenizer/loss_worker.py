"""One process of two that share a batch of images and texts: python loss_worker.py RANK FOLDER."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tokenizer.losses.distillation import distillation
from tokenizer.losses.sigmoid import same_text, sigmoid, text_keys
from tokenizer.losses.similarity import SimilarityScale, gather_rows

PROCESSES = 2
TEXTS = ("chair", "table", "lamp", "chair", "sofa")
PARTS = (slice(0, 3), slice(3, 5))


def batch() -> dict[str, Tensor]:
    """Vectors of five items: the student's images, the teacher's images, the texts."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(5, 8, generator=generator) for name in ("images", "teacher", "texts")} | {
        "keys": text_keys(TEXTS)
    }


def losses(part: dict[str, Tensor], first: int, every: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Losses of the items of `part`, and what their sum over all processes asks of its images and texts."""
    scale = SimilarityScale(scale=1.5, bias=-1.0)
    images, texts = (part[name].clone().requires_grad_() for name in ("images", "texts"))
    all_texts = every(texts)
    assert torch.equal(all_texts[first : first + len(texts)], texts)
    student = scale(images, all_texts)
    distilled = distillation(scale(part["teacher"], all_texts), student)
    paired = sigmoid(student + scale.bias, same_text(part["keys"], every(part["keys"])))
    (distilled.sum() + paired.sum()).backward()
    assert images.grad is not None
    assert texts.grad is not None
    return {
        "distillation": distilled.detach(),
        "sigmoid": paired.detach(),
        "image gradient": images.grad,
        "text gradient": texts.grad,
    }


def main(rank: int, folder: Path) -> None:
    """Compute this process's share and save it as RANK.pt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    part = {name: values[PARTS[rank]] for name, values in batch().items()}
    _, first = gather_rows(part["keys"])
    torch.save(losses(part, first, lambda rows: gather_rows(rows)[0]), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
