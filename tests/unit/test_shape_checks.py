import pytest
import torch
from jaxtyping import TypeCheckError

from offramp.models.base import Step


def test_a_wrong_shape_is_noticed_in_tests(make_model):
    model = make_model()
    step = Step(positions=torch.arange(3)[None])
    with pytest.raises(TypeCheckError):
        model.embed(torch.arange(3), step=step)  # (T,) instead of (B, T)
    with pytest.raises(TypeCheckError):
        Step(positions=torch.arange(3))
