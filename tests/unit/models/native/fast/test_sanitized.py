"""``make sanitize`` really loads the sanitized kernels: an access beside a tensor is caught."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    "OFFRAMP_SANITIZED" not in os.environ, reason="make sanitize builds other kernels and sets it"
)

BESIDE = """
import torch
from offramp.models.native.fast import kernels
x, weight, out = torch.zeros(1, 64), torch.zeros({rows}, 64), torch.zeros(1, 16)
read, written = (weight.data_ptr(), 0, 0), out.data_ptr()
kernels._compiled.linear(
    x.data_ptr(), read, 0, written, 1, 64, 16, 0, 0, False, 0.0, 0, 0, 1
)
print(kernels._compiled.__file__)
"""


@pytest.mark.parametrize("rows", [16, 8])
def test_an_access_beside_a_tensor_ends_the_process(rows):
    script = BESIDE.format(rows=rows)
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    if rows == 16:
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.startswith(os.environ["PYTHONPATH"])
    else:
        assert ran.returncode != 0
        assert "AddressSanitizer: heap-buffer-overflow" in ran.stderr
