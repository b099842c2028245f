import numpy as np
import pytest
import torch
import torch.nn.functional as F

from offramp.data import batches
from offramp.errors import ConfigError, CorpusError
from offramp.evaluation.trace import ExitTrace, collect_trace


def read(ids):
    return batches(ids, seq_len=8, batch_size=2)


@pytest.fixture
def ids(make_ids):
    return make_ids(1, 40)[0]  # two batches of 2 x 8, and a rest of 7 predictions


@pytest.fixture
def model(make_model):
    return make_model(dtype=torch.float32, num_hidden_layers=4, exit_layers=(1, 2))


def test_a_trace_records_every_token_at_every_exit_in_order(model, ids):
    trace = collect_trace(model, read(ids))
    assert (trace.num_layers, trace.exit_layers, trace.num_tokens) == (4, (1, 2, 4), 39)
    assert trace.targets.tolist() == ids[1:].tolist()
    start = 0
    for inputs, targets in read(ids):
        every = model.forward_all_layers(inputs)
        for row, layer in enumerate(trace.exit_layers):
            logits = every[layer - 1].flatten(0, 1).detach()
            here = slice(start, start + targets.numel())
            nll = F.cross_entropy(logits, targets.flatten(), reduction="none")
            np.testing.assert_allclose(trace.nll[row, here], nll.numpy(), rtol=1e-5)
            assert trace.argmax[row, here].tolist() == logits.argmax(-1).tolist()
            sure = logits.softmax(-1).amax(-1).numpy()
            np.testing.assert_allclose(trace.confidence["max_prob"][row, here], sure, rtol=1e-5)
        start += targets.numel()


def test_any_layers_may_be_recorded(model, ids):
    trace = collect_trace(model, read(ids), layers=[4, 3])
    assert trace.exit_layers == (3, 4)
    exits = collect_trace(model, read(ids))
    assert np.array_equal(trace.nll[1], exits.nll[2])
    assert not np.array_equal(trace.nll[0], exits.nll[1])


@pytest.mark.parametrize("layers", [[0, 1], [5], [-1]])
def test_a_layer_that_the_model_lacks_is_a_config_error(model, ids, layers):
    with pytest.raises(ConfigError, match="layers from 1 to 4"):
        collect_trace(model, read(ids), layers=layers)


def test_blocks_above_the_last_recorded_layer_do_not_run(model, ids):
    ran = []
    for i, block in enumerate(model.model.layers, start=1):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    collect_trace(model, [(ids[None, :-1], ids[None, 1:])], layers=[2])
    assert ran == [1, 2]


def test_the_caller_hears_of_every_batch(model, ids):
    heard = []
    collect_trace(model, read(ids), on_tokens=heard.append)
    assert heard == [16, 16, 7]


@pytest.mark.parametrize("length", [0, 1])
def test_too_few_tokens_to_predict_any_is_a_corpus_error(model, length):
    with pytest.raises(CorpusError, match="at least 2 tokens"):
        collect_trace(model, read(torch.zeros(length, dtype=torch.long)))


def test_a_text_shorter_than_a_window_is_read_whole(model):
    trace = collect_trace(model, read(torch.tensor([1, 2, 3])))
    assert trace.targets.tolist() == [2, 3]


def test_tracing_leaves_no_gradients_and_the_mode_alone(model, ids):
    model.train()
    collect_trace(model, read(ids))
    assert model.training
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())


def test_a_saved_trace_comes_back_whole(model, ids, tmp_path):
    trace = collect_trace(model, read(ids))
    trace.save(tmp_path / "trace.npz")
    back = ExitTrace.load(tmp_path / "trace.npz")
    assert (back.num_layers, back.exit_layers) == (4, (1, 2, 4))
    for name in ("targets", "nll", "argmax"):
        stored, kept = getattr(back, name), getattr(trace, name)
        assert stored.dtype == kept.dtype
        assert np.array_equal(stored, kept)
    assert set(back.confidence) == set(trace.confidence)
    assert np.array_equal(back.confidence["max_prob"], trace.confidence["max_prob"])
