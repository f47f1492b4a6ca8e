"""Which direction separates two classes of states?

A regularised logistic regression on standardised states, with the standardisation folded into weight and bias. Arrays
in, arrays out; knows no model.
"""

import numpy as np
from jaxtyping import Bool, Float, Float32
from sklearn.linear_model import LogisticRegression

STRENGTHS = (0.01, 0.1, 1.0)
"""Inverse regularisations of the standardised logistic regression that are tried."""


def fit_logistic(
    states: Float[np.ndarray, "n d_model"],
    labels: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    strength: float,
) -> tuple[Float32[np.ndarray, " d_model"], float]:
    """Fits one direction.

    Args:
        states: [n, d_model] one row a state.
        labels: [n] whether it is of the positive class.
        weights: [n] how much it counts; their mean should be 1.
        strength: inverse regularisation.

    Returns:
        [d_model] weight and bias, on the raw states.
    """
    values = states.astype(np.float64)
    mean = np.average(values, axis=0, weights=weights)
    scale = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weights)) + 1e-6
    model = LogisticRegression(C=strength, max_iter=2000).fit((values - mean) / scale, labels, sample_weight=weights)
    weight = model.coef_[0] / scale
    return weight.astype(np.float32), float(model.intercept_[0] - weight @ mean)
