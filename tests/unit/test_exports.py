import subprocess
import sys

import pytest

import offramp
from offramp import errors


@pytest.mark.parametrize("name", offramp.__all__)
def test_every_exported_name_resolves_to_its_home(name):
    value = getattr(offramp, name)
    home = getattr(value, "__module__", "offramp.")
    assert home.startswith("offramp.")
    if home != "offramp.":  # a plain value has no home
        assert getattr(sys.modules[home], name) is value


def test_every_error_is_exported_and_a_value_error():
    raised = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert set(raised) <= set(offramp.__all__)
    for value in raised.values():
        assert issubclass(value, offramp.OfframpError)
    assert issubclass(offramp.OfframpError, ValueError)


def test_no_name_is_exported_twice():
    assert len(set(offramp.__all__)) == len(offramp.__all__)


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'off_ramp'"):
        _ = offramp.off_ramp


def test_importing_offramp_is_silent_and_sets_nothing_global():
    code = """
import torch, warnings
before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
warnings.simplefilter("error")
import offramp
after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
