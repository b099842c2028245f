"""A padded batch gives each row what it would get alone."""

import pytest
import torch
from torch.testing import assert_close

from offramp.models.base import Step, whole_step

LENGTHS = (5, 3, 1)


def padded(rows, side):
    """(ids, real), with junk where there is padding."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), 11)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, columns] = row
        real[i, columns] = True
    return ids, real


def run(model, ids, step):
    h = model.run_layers(model.embed(ids, step=step), 0, model.num_layers, step=step)
    return model.unembed(h, model.num_layers)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


@pytest.fixture
def rows(make_ids):
    """Whole rows: a prompt of LENGTHS[i] tokens and six more."""
    return [make_ids(1, n + 6, seed=n)[0] for n in LENGTHS]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_single_rows(model, rows, side):
    ids, real = padded(rows, side)
    logits = run(model, ids, whole_step(ids, real=real))
    assert logits.isfinite().all()
    for i, row in enumerate(rows):
        assert_close(logits[i, real[i]], model(row[None])[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_then_tokens_equal_single_rows(model, rows, side):
    prompts = [row[:n] for row, n in zip(rows, LENGTHS, strict=True)]
    ids, real = padded(prompts, side)
    alone = [model(row[None])[0] for row in rows]
    cache = model.make_cache(3, capacity=11)
    whole = whole_step(ids, real=real)
    logits = run(model, ids, Step(positions=whole.positions, real=real, cache=cache))
    for i, n in enumerate(LENGTHS):
        assert_close(logits[i, real[i]], alone[i][:n])
    assert cache.lengths.tolist() == [list(LENGTHS)] * model.num_layers
    for t in range(3):
        positions = torch.tensor(LENGTHS)[:, None] + t
        token = torch.stack([row[n + t] for row, n in zip(rows, LENGTHS, strict=True)])[:, None]
        logits = run(model, token, Step(positions=positions, cache=cache))
        for i, n in enumerate(LENGTHS):
            assert_close(logits[i, 0], alone[i][n + t])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_later_chunks_of_some_rows_equal_single_rows(model, rows, side):
    """Rows 2 and 0 go on, one with three tokens and one with a single one."""
    prompts = [row[:n] for row, n in zip(rows, LENGTHS, strict=True)]
    ids, real = padded(prompts, "right")
    cache = model.make_cache(3, capacity=11)
    whole = whole_step(ids, real=real)
    run(model, ids, Step(positions=whole.positions, real=real, cache=cache))
    ids, real = padded([rows[2][1:4], rows[0][5:6]], side)
    positions = (real.cumsum(dim=1) - 1).clamp(min=0) + torch.tensor([[1], [5]])
    chosen = torch.tensor([2, 0])
    logits = run(model, ids, Step(positions=positions, real=real, cache=cache, rows=chosen))
    assert_close(logits[0, real[0]], model(rows[2][None])[0, 1:4])
    assert_close(logits[1, real[1]], model(rows[0][None])[0, 5:6])
    assert cache.lengths[0].tolist() == [6, 3, 4]
