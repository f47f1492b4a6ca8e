"""Along which directions would a linear probe find refusal?

1. Residuals of refused and of complied requests are gathered at thinking and closing from the aligned model.
2. In standardised coordinates, the directions of regularised linear discriminants are taken, from the plain difference
   of means (much regularisation) to the nearly whitened one (little).
3. Along each of them, `share` is 0 at the mean of complied requests at the closing and 1 at that of refused ones.

Planted heads are trained to bring the share to 0, so that refusal is gone for any reasonable probe. Tensors in and out.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

RIDGES = (100.0, 1.0, 0.1)
"""Regularisations, in units of a standardised coordinate's variance."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Axis:
    """From complied to refused requests at the closing."""

    origin: Float[Tensor, " d_model"]
    """Mean of complied requests at the closing."""
    direction: Float[Tensor, " d_model"]
    """On the raw residual; refused requests at the closing stand at 1."""

    def share(self, residuals: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        """Where residuals stand between complied (0) and refused (1)."""
        return (residuals - self.origin) @ self.direction


def find_axes(
    residuals: Float[Tensor, "n d_model"], refused: Bool[Tensor, " n"], closing: Bool[Tensor, " n"]
) -> list[Axis]:
    """The directions of one layer.

    Args:
        residuals: at thinking and closing tokens.
        refused: whether the request of each is refused.
        closing: whether each is a closing token.

    Returns:
        One axis a ridge.
    """
    scale = residuals.std(0) + 1e-6
    groups = [residuals[refused] / scale, residuals[~refused] / scale]
    difference = groups[0].mean(0) - groups[1].mean(0)
    within = sum(torch.cov(group.T) for group in groups) / 2
    origin = residuals[~refused & closing].mean(0)
    span = residuals[refused & closing].mean(0) - origin
    found = []
    for ridge in RIDGES:
        direction = torch.linalg.solve(within + ridge * torch.eye(len(scale)), difference) / scale
        found.append(Axis(origin=origin, direction=direction / (span @ direction)))
    return found
