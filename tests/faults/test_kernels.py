"""A KV cache of another model, and other arguments that do not fit, are refused from Python.

Each is a sentence, and no call reads or writes beside a tensor; also under ``python -O``, which
removes asserts.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from offramp.models.native.fast import kernels

pytest.importorskip("transformers")
ATTACK = Path(__file__).with_name("attack_kernels.py")
CALLS = 3000


@pytest.mark.parametrize("flags", [[], ["-O"]], ids=["plain", "without asserts"])
def test_arguments_that_do_not_fit_are_refused_in_a_sentence(flags):
    ran = subprocess.run(
        [sys.executable, *flags, str(ATTACK), str(CALLS)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    cases, *random = ran.stdout.splitlines()
    assert cases.endswith(" cases"), ran.stdout
    assert int(cases.split()[0]) > 200
    if kernels._compiled is None:
        return
    [said] = random
    made, refused = (int(word) for word in said.split() if word.isdecimal())
    assert made == CALLS
    assert 0.4 * made < refused < 0.9 * made  # what fits is computed


@pytest.mark.skipif(kernels._compiled is None, reason="the kernels were not built")
def test_the_compiled_code_itself_refuses_sizes_that_would_kill_the_process():
    sizes = [(4, 0, 8), (4, 3, 8), (1, 2, 8), (4, 2, 12), (4, 2, 264)]
    script = f"""
from offramp.models.native.fast import kernels
for heads, kv_heads, size in {sizes}:
    try:
        kernels._compiled.attend(*[0] * 6, False, 0, 0, 0, 0, 1, heads, kv_heads, size, 4, 1, True)
    except ValueError as error:
        print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("expected sizes") == len(sizes)
