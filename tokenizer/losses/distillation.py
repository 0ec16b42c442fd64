"""Distillation: images relate to texts as a frozen teacher says they do (PAPER 2).

    D_i = KL(softmax(s_teacher_i / tau) || softmax(s_student_i / tau)),  0 or more, in nats

s_i are the scores of image i with all texts of the global batch: exp(scale) times the cosine, see `scores`. The teacher
is a frozen image tower; both sides are compared with the same frozen text tower, so only images have gradients and
every process needs no more than the texts of the others (`gather_rows`). The bias of the sigmoid loss is the same for
all texts and drops out. Where no image tower was trained with the text tower, an image's own text takes the teacher's
place: its scores with all texts say as well which of them are close.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from tokenizer.errors import InputError


def distillation(teacher: Tensor, student: Tensor, temperature: float = 2.0) -> Tensor:
    """Divergence of the student's scores from the teacher's.

    Args:
        teacher: [b, B] scores of the b images of this process with all B texts; no gradient flows into it.
        student: [b, B].
        temperature: divides both.

    Returns:
        [b] float32 (float64 for float64); the loss is its mean.

    Raises:
        InputError: shapes that differ, or a temperature that is not positive.
    """
    if teacher.shape != student.shape or student.ndim != 2:
        raise InputError(
            f"distillation compares scores [images, texts], got {list(teacher.shape)} and {list(student.shape)}"
        )
    if not temperature > 0:
        raise InputError(f"the temperature must be positive, got {temperature}")
    wanted, found = (
        F.log_softmax((x if x.dtype.itemsize > 2 else x.float()) / temperature, dim=1)
        for x in (teacher.detach(), student)
    )
    return F.kl_div(found, wanted, reduction="none", log_target=True).sum(dim=1)
