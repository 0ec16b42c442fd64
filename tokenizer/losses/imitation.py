"""Imitation: pooled vectors tell what an image network sees in the same sample.

    I_i = mean over d of (h(v_i)_d - n(f_i)_d)^2,  0 or more; h a trained linear layer, n(f) = (f - mean f) / std f

f are the teacher's pooled features, n layer normalisation without parameters: every sample weighs alike and the loss
means the same for every network, about 1 for an h that says nothing. A hint to what a larger network knows (FitNets,
arXiv 1412.6550), with normalised features as target as in data2vec (arXiv 2202.03555). It is not in the paper's
objective, whose encoder knew pictures before (`tokenizer.losses.weights`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.errors import InputError


def imitation(made: Tensor, features: Tensor) -> Tensor:
    """Squared distance to the normalised features of each sample.

    Args:
        made: [n, D] floating, what the student says.
        features: [n, D] floating, of the teacher, as it gives them.

    Returns:
        [n] float32 (float64 for float64).

    Raises:
        InputError: shapes that differ.
    """
    if made.shape != features.shape or made.ndim != 2:
        raise InputError(
            f"imitation compares features [n, D] of one network, got {list(made.shape)} and {list(features.shape)}"
        )
    with torch.autocast(made.device.type, enabled=False):
        wide = made if made.dtype == torch.float64 else made.float()
        return (wide - F.layer_norm(features.to(wide.dtype), features.shape[1:])).square().mean(dim=1)
