import pytest


@pytest.fixture(
    params=[("pre", 4), ("pre", 2), ("post", 4), ("post", 1)],
    ids=["pre-norm", "pre-norm, 2 of 4 kv heads", "post-norm", "post-norm, 1 kv head"],
)
def model(request, make_model):
    norm, kv_heads = request.param
    return make_model(norm=norm, num_key_value_heads=kv_heads)
