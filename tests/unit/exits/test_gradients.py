"""Gradients at the branches: a chain of linear maps whose gradients are worked out by hand."""

import pytest
import torch
from torch import Tensor

from offramp.exits.gradients import Branch, branch_of, detached, equilibrium, plain
from offramp.exits.objective import ObjectiveConfig

BRANCHES = [plain, detached, equilibrium]


def run_chain(
    branch: Branch, maps: list[Tensor], heads: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the sum of head_i . h_i, h_i = map_i h_(i-1): at each h_i, and of each head."""
    h = torch.ones(1, len(heads[0]), dtype=torch.float64, requires_grad=True)
    heads = [head.clone().requires_grad_() for head in heads]
    states, loss = [], torch.zeros((), dtype=torch.float64)
    for i, (matrix, head) in enumerate(zip(maps, heads, strict=True), start=1):
        h = h @ matrix.T
        h.retain_grad()
        states.append(h)
        seen, h = branch(h, i, len(maps))
        loss = loss + (seen @ head).sum()
    loss.backward()
    trunk = [torch.zeros_like(h[0]) if h.grad is None else h.grad[0] for h in states]
    return trunk, [head.grad for head in heads]


def scalars(branch: Branch) -> list[float]:
    """Trunk gradients of three exits whose own gradients are 1, 2 and 6, nothing in between."""
    maps = [torch.eye(1, dtype=torch.float64)] * 3
    heads = [torch.tensor([value], dtype=torch.float64) for value in (1.0, 2.0, 6.0)]
    trunk, of_heads = run_chain(branch, maps, heads)
    assert [grad.item() for grad in of_heads] == [1, 1, 1]  # h = 1: whole, whatever the branch
    return [grad.item() for grad in trunk]


@pytest.mark.parametrize(
    ("branch", "expected"),
    [
        (plain, [1 + 2 + 6, 2 + 6, 6]),
        (detached, [6, 6, 6]),
        (equilibrium, [(1 + 2 + 6) / 3, (2 + 6) / 2, 6]),
    ],
)
def test_trunk_gradients_equal_the_table(branch, expected):
    assert scalars(branch) == pytest.approx(expected)


def random_chain(k: int) -> tuple[list[Tensor], list[Tensor]]:
    random = torch.Generator().manual_seed(k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    return [draw(4, 4) / 2 for _ in range(k)], [draw(4) for _ in range(k)]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_under_equilibrium_the_trunk_gets_the_mean_of_the_losses_above(k):
    maps, heads = random_chain(k)
    trunk, of_heads = run_chain(equilibrium, maps, heads)
    for i in range(k):
        from_exits, through = [], torch.eye(4, dtype=torch.float64)
        for j in range(i, k):
            if j > i:
                through = maps[j] @ through
            from_exits.append(through.T @ heads[j])
        torch.testing.assert_close(trunk[i], torch.stack(from_exits).mean(dim=0))
    _, plain_heads = run_chain(plain, maps, heads)
    for grad, whole in zip(of_heads, plain_heads, strict=True):
        assert torch.equal(grad, whole)


def test_equilibrium_bounds_the_scale_that_plain_sums_let_grow():
    """Unit exits on an identity chain of 8: 8, 7, ... 1 against 1, 1, ... 1."""
    maps = [torch.eye(1, dtype=torch.float64)] * 8
    heads = [torch.ones(1, dtype=torch.float64)] * 8
    plain_trunk, _ = run_chain(plain, maps, heads)
    assert [grad.item() for grad in plain_trunk] == [8, 7, 6, 5, 4, 3, 2, 1]
    balanced, _ = run_chain(equilibrium, maps, heads)
    assert [grad.item() for grad in balanced] == pytest.approx([1.0] * 8)


def test_independent_exits_variance_is_one_over_the_losses_above():
    """Li et al.: exits' gradients of unit variance, independent; k - i + 1 when summed."""
    random = torch.Generator().manual_seed(0)
    k, width = 4, 20_000
    maps = [torch.tensor(1.0, dtype=torch.float64)] * k
    heads = [torch.randn(width, dtype=torch.float64, generator=random) for _ in range(k)]
    for branch, expected in ((plain, [4, 3, 2, 1]), (equilibrium, [1 / 4, 1 / 3, 1 / 2, 1])):
        h = torch.ones(width, dtype=torch.float64, requires_grad=True)
        states, loss = [], torch.zeros((), dtype=torch.float64)
        for i, (scale, head) in enumerate(zip(maps, heads, strict=True), start=1):
            h = h * scale
            h.retain_grad()
            states.append(h)
            seen, h = branch(h, i, k)
            loss = loss + seen @ head
        loss.backward()
        assert [state.grad.var().item() for state in states] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("i", "k"), [(1, 1), (1, 3), (2, 3), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_branch_changes_a_number(branch, i, k, dtype):
    h = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for state in branch(h.requires_grad_(), i, k):
        assert torch.equal(state, h)
        assert state.dtype == dtype


@pytest.mark.parametrize(
    ("fields", "branch"),
    [
        ({}, plain),
        ({"detach_exits": True}, detached),
        ({"gradient_equilibrium": True}, equilibrium),
    ],
)
def test_the_config_names_the_branch(fields, branch):
    assert branch_of(ObjectiveConfig(**fields)) is branch
