"""The waist: what features may know of a model."""

import ast
from pathlib import Path

import pytest
import torch

import offramp
from offramp.errors import ConfigError
from offramp.models.base import require_blocks
from offramp.models.layer_names import layers_by_name

SOURCE = Path(offramp.__file__).parent
MODEL_CLASSES = {"Transformer", "HuggingFaceModel"}


def names_in(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} | {
        part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)
    }


def class_checks(tree: ast.AST) -> list[int]:
    """Lines of isinstance, issubclass and match on a class of models."""
    lines = []
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if called and node.func.id in ("isinstance", "issubclass"):
            if any(MODEL_CLASSES & names_in(argument) for argument in node.args[1:]):
                lines.append(node.lineno)
        elif isinstance(node, ast.MatchClass) and MODEL_CLASSES & names_in(node.cls):
            lines.append(node.cls.lineno)
    return lines


def test_nothing_outside_models_asks_for_the_class_of_a_model():
    found = {
        f"{path.relative_to(SOURCE)}:{line}"
        for path in SOURCE.rglob("*.py")
        if "models" not in path.relative_to(SOURCE).parts
        for line in class_checks(ast.parse(path.read_text()))
    }
    assert found == set()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("isinstance(model, Transformer)", [1]),
        ("isinstance(loaded.model, nn.Module | decoder.Transformer)", [1]),
        ("issubclass(kind, (str, HuggingFaceModel))", [1]),
        ("match model:\n    case HuggingFaceModel(): pass", [2]),
        ("isinstance(model, str)\nTransformer(config)", []),
    ],
)
def test_the_search_finds_what_it_looks_for(code, found):
    assert class_checks(ast.parse(code)) == found


def test_a_shared_parameter_belongs_to_the_lowest_layer():
    low, one, two, head = (torch.nn.Linear(2, 2, bias=False) for _ in range(4))
    head.weight = low.weight
    model = torch.nn.ModuleDict({"head": head, "two": two, "one": one, "low": low})
    model["norm"] = torch.nn.RMSNorm(2)
    assert layers_by_name(model, below=[low], blocks=[one, two]) == {
        "head.weight": 0,  # the name under which the tied parameter comes first
        "two.weight": 2,
        "one.weight": 1,
        "norm.weight": 3,
    }


def test_a_model_that_runs_only_whole_is_refused_with_the_reason(make_model):
    model = make_model()
    require_blocks(model, "anything")
    model.why_no_blocks = "its blocks are unknown"
    with pytest.raises(ConfigError) as caught:
        require_blocks(model, "layer_dropout")
    assert str(caught.value) == (
        "layer_dropout: expected a model whose blocks can be run one by one, got one that can "
        "only run as a whole, since its blocks are unknown"
    )
