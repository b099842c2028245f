"""A sweep over the trace equals the seed's router: compute every exit, keep the first sure one."""

import pytest
import torch
import torch.nn.functional as F

from offramp.data import batches
from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import collect_trace


@torch.inference_mode()
def naive_router(model, ids, thresholds):
    """PPL, Shallow% and Compute% the slow way, in the model's own precision."""
    total, layers_run, shallow, tokens = 0.0, 0, 0, 0
    for inputs, targets in batches(ids, seq_len=16, batch_size=4):
        logits = model.forward_all_layers(inputs)
        chosen = logits[-1]
        layers = torch.full(targets.shape, model.num_layers)
        for layer, threshold in reversed(list(zip(model.exit_layers, thresholds, strict=False))):
            sure = logits[layer - 1].softmax(dim=-1).amax(dim=-1) >= threshold
            chosen = torch.where(sure[..., None], logits[layer - 1], chosen)
            layers = torch.where(sure, layer, layers)
        total += F.cross_entropy(chosen.flatten(0, 1), targets.flatten(), reduction="sum").item()
        layers_run += layers.sum().item()
        shallow += (layers < model.num_layers).sum().item()
        tokens += targets.numel()
    perplexity = torch.tensor(total / tokens, dtype=torch.float64).exp().item()
    return perplexity, 100 * shallow / tokens, 100 * layers_run / (tokens * model.num_layers)


@pytest.mark.parametrize("exit_head", ["shared", "full"])
def test_a_sweep_equals_the_naive_router(make_model, make_ids, exit_head):
    model = make_model(
        dtype=torch.float32, num_hidden_layers=5, exit_layers=(2, 3), exit_head=exit_head
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # spread the confidences
    ids = make_ids(1, 300)[0]
    trace = collect_trace(model, batches(ids, seq_len=16, batch_size=4))
    assert trace.exit_layers == (2, 3, 5)
    thresholds = [0.0, 0.2, 0.3, 0.5, 0.7, 0.95, 1.1, (0.6, 0.3), (0.3, 2.0), (2.0, 0.3)]
    rows = sweep(trace, thresholds)
    for threshold, row in zip(thresholds, rows, strict=True):
        pair = threshold if isinstance(threshold, tuple) else (threshold, threshold)
        ppl, shallow_pct, compute_pct = naive_router(model, ids, pair)
        assert row.ppl == pytest.approx(ppl, rel=1e-5)
        assert row.shallow_pct == pytest.approx(shallow_pct)
        assert row.compute_pct == pytest.approx(compute_pct)
    assert len({row.compute_pct for row in rows}) > 6  # the thresholds really differ
