"""What an image network saw in a sample (`data.making.teach`): KEY.teacher.npy, float16 [D]."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from data.samples import TEACHER_EXTENSION, SampleError


def read_teacher(files: Mapping[str, bytes], name: str) -> Tensor | None:
    """float32 [D]; None where nobody asked the network.

    Raises:
        SampleError: "damaged teacher" for a file that cannot be read, or holds something else than finite floats [D].
    """
    if TEACHER_EXTENSION not in files:
        return None
    try:
        features = np.load(io.BytesIO(files[TEACHER_EXTENSION]), allow_pickle=False)
    except Exception as error:  # numpy's reader raises whatever damaged bytes lead it to
        raise _damaged(name, f"not readable ({' '.join(str(error).split())})") from None
    if features.ndim != 1 or features.dtype.kind != "f" or not len(features) or not np.isfinite(features).all():
        raise _damaged(name, f"must hold finite floats [D], not {features.dtype} {list(features.shape)}")
    return torch.from_numpy(features.astype(np.float32))


def _damaged(name: str, what: str) -> SampleError:
    return SampleError("damaged teacher", f"{name}.{TEACHER_EXTENSION}: {what}")
