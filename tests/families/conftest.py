import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """One process runs all tests of a family, so that its model is made once (--dist loadgroup)."""
    for item in items:
        family = getattr(item, "callspec", None) and item.callspec.params.get("outcome")
        if family:
            item.add_marker(pytest.mark.xdist_group(family))
