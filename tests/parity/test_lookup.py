"""Drafts of prompt lookup, verified in one call of the kernels: the text is that of full depth."""

import pytest
import torch

from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
from offramp.models.native.fast import kernels
from offramp.models.native.quantise import quantised

pytestmark = pytest.mark.skipif(kernels._compiled is None, reason="the kernels were not built")

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "exit_layers": (2,),
    "intermediate_size": 96,
    "max_position_embeddings": 300,
}
MODELS = [
    {},
    {"num_key_value_heads": 2, "kv_source_layer": 2},
    {"norm": "post", "exit_head": "norm"},
]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6] * 4


@pytest.fixture(params=["float32", "bfloat16", "int8", "int4"])
def form(request):
    return request.param


@pytest.fixture(params=MODELS, ids=["plain", "shared keys and values", "post-norm"])
def model(make_model, request, form):
    made = make_model(dtype=torch.float32, **SHAPE, **request.param)
    if form.startswith("int"):
        return quantised(made, form)
    return made.to(getattr(torch, form))


def written(model, **options):
    """The new tokens, and the counts of the work."""
    config = GenerateConfig(max_new_tokens=60, **options)
    generation = generate(model, PROMPT, config)
    return [token.id for token in generation], generation


@pytest.mark.parametrize("most", [1, 4, 15])
def test_lookup_changes_no_token(model, most):
    drafts = {"speculative": True, "adaptive": False, "draft_threshold": 1.0}
    calls, make_router = [], model.router

    def routers(cache, spec):
        router = make_router(cache, spec)
        step = router.step

        def counted(ids, *arguments):
            calls.append(len(ids))
            return step(ids, *arguments)

        router.step = counted
        return router

    plain, _ = written(model)
    model.router = routers
    found, generation = written(model, max_drafts=most, **drafts)
    model.router = lambda cache, spec: None
    in_python, without = written(model, max_drafts=most, **drafts)
    assert found == plain == in_python
    assert max(calls) == 1 + most, "drafts were not verified in one call"
    assert generation.acceptance_rate == without.acceptance_rate
    assert generation.acceptance_rate > 0.05
    assert generation.work == without.work
