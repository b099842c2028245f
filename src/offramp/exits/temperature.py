"""Temperature scaling (Guo et al. 2017): one number by which an exit's logits are divided so that
its probabilities mean what they say. It changes no argmax and no likelihood that is reported.
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
    """The temperature from LEAST to MOST at which held-out targets have the least NLL."""

    def nll(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), targets))

    bounds = (math.log(LEAST), math.log(MOST))
    found = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return math.exp(float(found.x))
