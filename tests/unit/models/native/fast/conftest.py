"""Fixtures of the compiled kernels: their threads, and the instructions that they may use."""

import pytest
import torch

from offramp.models.native.fast import kernels


@pytest.fixture(params=[1, 4], ids="{} threads".format)
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[0, 4], ids=["portable", "best"])
def _kind(request):
    kernels._compiled.kind(request.param)
    yield
    kernels._compiled.kind(4)
