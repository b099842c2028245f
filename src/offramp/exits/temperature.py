"""Temperature scaling (Guo et al. 2017).

The logits of an exit are divided by one number so that its probabilities are calibrated. It does
not change which token is most likely, nor any reported likelihood.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor

LEAST, MOST = 0.05, 20.0


@torch.no_grad()
def fit_temperature(logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> float:
    """Return the temperature, from LEAST to MOST, with the least NLL of the held-out targets."""

    def nll(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), targets))

    bounds = (math.log(LEAST), math.log(MOST))
    found = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return math.exp(float(found.x))
