import numpy as np
import pytest
import torch
import torch.nn.functional as F

from offramp.data import batches
from offramp.errors import ConfigError, CorpusError
from offramp.evaluation import reader
from offramp.evaluation.sample import collect_sample
from offramp.evaluation.trace import ExitTrace, collect_trace
from offramp.exits.confidence import CONFIDENCE, ExitView
from offramp.exits.gate import FittedExits, Gate
from offramp.models.base import whole_step


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


@pytest.fixture
def fitted():
    """Gates for the exits 1 and 2 of the model, and a temperature."""
    torch.manual_seed(0)
    return FittedExits(
        gates={
            "gate": {1: Gate(16), 2: Gate(16)},
            "gain": {1: Gate(16, outputs=2), 2: Gate(16)},
        },
        temperatures={1: 2.0},
    )


def everything(model, ids, fitted):
    return collect_trace(model, read(ids), measures=tuple(CONFIDENCE), fitted=fitted, kl=True)


def test_every_measure_is_recorded_as_a_view_of_each_exit_has_it(model, ids, fitted):
    trace = everything(model, ids, fitted)
    inputs, _ = next(iter(read(ids)))
    here = slice(0, inputs.numel())
    states = dict(model.states_at(inputs, range(5), step=whole_step(inputs)))
    earlier = None
    for row, layer in enumerate(trace.exit_layers):
        view = ExitView(
            exit_layer=layer,
            logits=model.unembed(states[layer], layer),
            state=states[layer],
            previous_state=states[layer - 1],
            earlier=earlier,
            fitted=fitted,
        )
        for name, measure in CONFIDENCE.items():
            if measure.needs_gate and layer == 4:
                assert set(trace.scores(name)[row]) == {0.0 if name == "gain" else 1.0}
                continue
            expected = measure.score(view).flatten().detach()
            np.testing.assert_allclose(
                trace.scores(name)[row, here], expected, rtol=1e-5, atol=1e-6, err_msg=name
            )
        if layer != 4:
            expected = view.expected_kl.flatten(0, 1).T.detach()
            np.testing.assert_allclose(trace.expected_kl[row, row:, here], expected, rtol=1e-5)
            assert np.isnan(trace.expected_kl[row, :row]).all()
        earlier = view.agreement


def test_only_what_is_asked_for_is_recorded(model, ids):
    trace = collect_trace(model, read(ids))
    assert list(trace.confidence) == ["max_prob"]
    assert trace.kl is None
    assert trace.expected_kl is None


def test_the_divergence_from_the_last_layer_by_hand(model, ids):
    trace = collect_trace(model, read(ids), measures=(), kl=True)
    inputs, _ = next(iter(read(ids)))
    log_probs = [
        model.unembed(h, layer).log_softmax(-1).flatten(0, 1).detach()
        for layer, h in model.states_at(inputs, (1, 2, 4), step=whole_step(inputs))
    ]
    for row in range(3):
        kl = F.kl_div(log_probs[row], log_probs[2], log_target=True, reduction="none").sum(-1)
        np.testing.assert_allclose(trace.kl[row, : len(kl)], kl, rtol=1e-4, atol=1e-6)
    assert (trace.kl[:2] > 0).all()
    assert (trace.kl[2] == 0).all()
    with pytest.raises(ConfigError, match="expected the last, 4, for kl"):
        collect_trace(model, read(ids), layers=[1, 2], kl=True)


def test_a_temperature_changes_confidence_and_no_likelihood(model, ids, fitted):
    plain = collect_trace(model, read(ids), kl=True)
    hot = collect_trace(model, read(ids), kl=True, fitted=fitted)
    for name in ("nll", "argmax", "kl"):
        assert np.array_equal(getattr(plain, name), getattr(hot, name))
    assert (hot.scores("max_prob")[0] < plain.scores("max_prob")[0]).all()
    assert np.array_equal(hot.scores("max_prob")[1:], plain.scores("max_prob")[1:])


def test_every_token_knows_its_window_and_its_place_there(model, ids):
    trace = collect_trace(model, read(ids))
    assert trace.sequence.tolist() == [row for row in range(4) for _ in range(8)] + [4] * 7
    assert trace.position.tolist() == [*range(8)] * 4 + [*range(7)]


def test_a_chunk_of_tokens_at_a_time_gives_the_same_trace(model, ids, fitted, monkeypatch):
    whole = everything(model, ids, fitted)
    monkeypatch.setattr(reader, "CHUNK_LOGITS", 5 * 13)  # 5 tokens
    in_chunks = everything(model, ids, fitted)
    assert np.array_equal(whole.argmax, in_chunks.argmax)
    for name in ("nll", "kl", "expected_kl"):
        np.testing.assert_allclose(
            getattr(whole, name), getattr(in_chunks, name), rtol=1e-5, atol=1e-6
        )
    for name, scores in whole.confidence.items():
        np.testing.assert_allclose(scores, in_chunks.confidence[name], rtol=1e-5, atol=1e-6)


def test_logits_of_more_than_a_chunk_never_exist(model, ids, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_LOGITS", 5 * 13)
    sizes = []
    unembed = model.unembed

    def watched(h, layer):
        sizes.append(h.shape[1])
        return unembed(h, layer)

    monkeypatch.setattr(model, "unembed", watched)
    collect_trace(model, read(ids), kl=True)
    assert max(sizes) == 5


def test_a_gain_gate_for_other_exits_is_a_config_error(model, ids, fitted):
    gates = {"gain": {1: fitted.gates["gain"][2], 2: fitted.gates["gain"][2]}}
    with pytest.raises(ConfigError, match=r"exit layer 1 for the 2 exits \[1, 2\], got one for 1"):
        collect_trace(model, read(ids), measures=("gain",), fitted=FittedExits(gates=gates))


def test_an_unknown_measure_and_a_missing_gate_are_config_errors(model, ids):
    with pytest.raises(ConfigError, match="got 'top1'"):
        collect_trace(model, read(ids), measures=("top1",))
    with pytest.raises(ConfigError, match="a fitted gate at exit layer 1"):
        collect_trace(model, read(ids), measures=("gate",))


def test_fewer_exits_and_fewer_tokens_of_a_whole_trace(model, ids, fitted):
    trace = everything(model, ids, fitted)
    fewer = trace.at((2, 4))
    assert np.array_equal(fewer.kl, trace.kl[1:])
    assert np.array_equal(fewer.expected_kl, trace.expected_kl[1:, 1:])
    assert np.array_equal(fewer.scores("gain"), trace.scores("gain")[1:])
    alone = 1 + (trace.argmax[2] == trace.argmax[1])  # exit 1 is not counted any more
    assert fewer.scores("patience").tolist() == [[1] * 39, alone.tolist()]
    some = trace.tokens(trace.sequence == 1)
    assert some.num_tokens == 8
    assert np.array_equal(some.nll, trace.nll[:, 8:16])
    assert np.array_equal(some.expected_kl[0, 1], trace.expected_kl[0, 1, 8:16])
    assert np.array_equal(some.scores("gate"), trace.scores("gate")[:, 8:16])
    assert some.targets.tolist() == trace.targets[8:16].tolist()
    assert set(some.sequence) == {1}


def test_everything_that_was_recorded_comes_back(model, ids, fitted, tmp_path):
    trace = everything(model, ids, fitted)
    trace.save(tmp_path / "trace.npz")
    back = ExitTrace.load(tmp_path / "trace.npz")
    for name in ("sequence", "position", "kl", "expected_kl"):
        assert np.array_equal(getattr(back, name), getattr(trace, name), equal_nan=True)
    assert list(back.confidence) == list(CONFIDENCE)


def test_a_trace_of_an_earlier_version_comes_back(tmp_path):
    arrays = {"targets": np.arange(3), "argmax": np.zeros((2, 3), dtype=np.int64)}
    arrays |= {
        "nll": np.ones((2, 3), np.float32),
        "confidence.max_prob": np.ones((2, 3), np.float32),
    }
    np.savez(tmp_path / "old.npz", layers=np.array([3, 1, 3]), **arrays)
    trace = ExitTrace.load(tmp_path / "old.npz")
    assert (trace.num_layers, trace.exit_layers, trace.num_tokens) == (3, (1, 3), 3)
    assert trace.sequence is trace.position is trace.kl is None


def test_a_sample_keeps_the_states_of_its_tokens(model, ids):
    sample = collect_sample(model, read(ids), max_tokens=17)  # a third window is begun, so whole
    assert sample.trace.num_tokens == 24
    assert sample.trace.confidence == {}
    assert sample.dtype == torch.float32
    inputs, _ = next(iter(read(ids)))
    for layer, h in model.states_at(inputs, (1, 2, 4), step=whole_step(inputs)):
        assert sample.states[layer].dtype == torch.float16
        assert sample.states[layer].shape == (24, 16)
        assert torch.equal(sample.states[layer][:16], h.flatten(0, 1).half())
    assert collect_sample(model, read(ids), max_tokens=10**6).trace.num_tokens == 39


def test_states_beyond_float16_stay_finite(model, ids):
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1e6
    sample = collect_sample(model, read(ids), max_tokens=8)
    assert float(sample.states[1][:, 0].max()) == 65504.0


def test_a_sample_of_no_tokens_is_a_config_error(model, ids):
    with pytest.raises(ConfigError, match="max_tokens: expected at least 1, got 0"):
        collect_sample(model, read(ids), max_tokens=0)
