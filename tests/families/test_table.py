"""The table in docs/models.md is that of the installed version."""

import warnings

import transformers
from table import committed, markers, table


def test_the_table_of_families_in_the_docs_is_the_one_of_this_version():
    """If it differs: ``python tests/families/table.py`` with this version writes it."""
    found = committed(transformers.__version__)
    assert found is not None, f"docs/models.md has no line {markers(transformers.__version__)[0]}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found == table()
