import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import offramp
from offramp import errors

SOURCE = ast.parse(Path(offramp.__file__).read_text(encoding="utf-8"))


def imports(body):
    """(module, name) of every import in a list of statements."""
    return {
        (node.module, alias.name)
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def for_type_checkers():
    """(module, name) of every import under ``if TYPE_CHECKING``."""
    blocks = [node for node in SOURCE.body if isinstance(node, ast.If)]
    (block,) = [node for node in blocks if isinstance(node.test, ast.Name)]
    return imports(block.body)


@pytest.mark.parametrize("name", offramp.__all__)
def test_every_exported_name_is_what_type_checkers_see(name):
    seen = {n: module for module, n in for_type_checkers() | imports(SOURCE.body)}
    assert getattr(offramp, name) is getattr(import_module(seen[name]), name)


@pytest.mark.parametrize("name", offramp.__all__)
def test_every_exported_class_and_function_is_defined_where_it_is_imported_from(name):
    value = getattr(offramp, name)
    if callable(value):
        assert {module for module, n in for_type_checkers() if n == name} <= {value.__module__}


def test_the_names_imported_late_are_those_that_type_checkers_see():
    late = {(home, name) for home, names in offramp._HOMES.items() for name in names}
    assert late == for_type_checkers()


def test_all_lists_every_public_name_once_and_sorted_and_dir_shows_it():
    public = {name for _, name in for_type_checkers() | imports(SOURCE.body)}
    public -= {"TYPE_CHECKING", "Any"}
    assert sorted(public) == sorted(offramp.__all__)
    assert public <= set(dir(offramp))


def test_every_error_is_exported_and_a_value_error():
    raised = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert set(raised) <= set(offramp.__all__)
    for value in raised.values():
        assert issubclass(value, offramp.OfframpError | offramp.OfframpWarning)
    assert issubclass(offramp.OfframpError, ValueError)


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'off_ramp'"):
        _ = offramp.off_ramp


def test_importing_every_name_is_silent_and_sets_nothing_global():
    code = """
import torch, warnings
before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
warnings.simplefilter("error")
from offramp import *
after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
