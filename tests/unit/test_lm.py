"""The Python front door, by public names."""

import csv
import gc
import json

import pytest
import torch
import transformers

import offramp
from offramp.commands.text import MeasuredText
from offramp.exits.gate import FittedExits, Gate
from offramp.models.open import open_model
from offramp.studies.study.run import StudyText

QUICK = {"layers": 3, "dim": 16, "heads": 2, "exits": [1], "seq_len": 16, "batch_size": 16}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFRAMP_CACHE", str(tmp_path_factory.mktemp("cache")))
        out = tmp_path_factory.mktemp("lm") / "model"
        yield offramp.train("pangram", **QUICK, steps=60, lr=1e-2, out=out)


def test_a_trained_model_says_what_it_is_in_a_line(lm):
    assert lm.exit_layers == (1, 3)
    assert lm.exits_trained
    assert "3 layers, exits 1" in repr(lm)
    assert len(repr(lm)) < 300


def test_without_a_folder_a_model_lives_until_it_is_saved(lm, tmp_path):
    other = offramp.train("pangram", **QUICK, steps=2, loss_weights="asymmetric:0.5")
    rows, before = other.sweep("pangram", [0.5]).rows, other.sha256
    certificate = other.certify("pangram", epsilon=0.5)
    other.save(tmp_path / "kept")
    del other
    gc.collect()  # the temporary folder goes
    again = offramp.load(tmp_path / "kept")
    assert again.sha256 == before != lm.sha256
    assert again.sweep("pangram", [0.5]).rows == rows
    assert again.sweep("pangram", certificate=certificate).rows


@pytest.mark.parametrize("unfreeze", [False, True])
@pytest.mark.parametrize("source", ["folder", "memory"])
def test_a_tuned_model_is_saved_whole_where_its_backbone_would_go(
    checkpoint, tmp_path, unfreeze, source
):
    text = str(checkpoint / "text.txt")
    quick = {"exits": [1], "seq_len": 32, "epochs": 1, "tokens": 800, "unfreeze": unfreeze}
    model, tokenizer = checkpoint, None
    if source == "memory":
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=offramp.load(checkpoint).tokenizer
        )
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    lm = offramp.tune(model, text, tokenizer=tokenizer, **quick, exit_head="norm")
    rows, before = lm.sweep(text, [0.5]).rows, lm.sha256
    lm.save(tmp_path / "kept")
    del lm, model
    gc.collect()
    again = offramp.load(tmp_path / "kept")
    assert again.sha256 == before
    assert again.sweep(text, [0.5]).rows == rows
    if source == "memory":
        assert again.generate("7 quick", chat=True, max_new_tokens=2).text


def test_tokens_come_one_by_one_and_as_text(lm):
    tokens = list(lm.generate("The ", threshold=0.0, max_new_tokens=8))
    assert [token.exit_layer for token in tokens] == [3] + [1] * 7
    whole = lm.generate("The ", threshold=0.0, max_new_tokens=8)
    assert "0 tokens so far" in repr(whole)
    assert whole.text == "".join(token.text for token in tokens)
    assert "8 tokens so far" in repr(whole)


def test_a_sweep_has_rows_a_plot_and_files(lm, tmp_path):
    table = lm.sweep("pangram", [0.5, (0.9,)])
    assert [row.threshold for row in table.rows] == [0.5, (0.9,)]
    assert all(row.flops_pct > row.compute_pct for row in table.rows)
    assert table.plot().to_dict()["layer"]
    assert len(repr(table).splitlines()) == 3
    table.save(tmp_path / "t.csv")
    table.save(tmp_path / "t.json")
    with (tmp_path / "t.csv").open() as file:
        [first, second] = csv.DictReader(file)
    assert float(first["ppl"]) == table.rows[0].ppl
    assert second["threshold"] == "0.9"
    assert len(json.loads((tmp_path / "t.json").read_text())["rows"]) == 2
    with pytest.raises(offramp.ConfigError, match=r"\.json, \.csv or \.tex"):
        table.save(tmp_path / "t.xlsx")


def test_a_certificate_is_used_and_refused_for_another_model(lm, tmp_path):
    certificate = lm.certify("pangram", epsilon=0.3)
    assert len(repr(certificate)) < 200
    certificate.save(tmp_path / "c.json")
    for given in (certificate, tmp_path / "c.json"):
        [row] = lm.sweep("pangram", certificate=given).rows
        assert row.threshold == certificate.thresholds
        generation = lm.generate("The ", certificate=given, max_new_tokens=4)
        assert len(generation.text) == 4
    other = lm.fit("pangram")
    with pytest.raises(offramp.CertificateError, match="expected one for this model"):
        other.generate("The ", certificate=certificate)
    for given in ({"threshold": 0.5}, {"confidence": "margin"}):
        with pytest.raises(offramp.ConfigError, match="expected none with a certificate"):
            lm.generate("The ", **given, certificate=certificate)
    for given in ({"thresholds": 0.5}, {"confidence": "margin"}):
        with pytest.raises(offramp.ConfigError, match="expected none with a certificate"):
            lm.sweep("pangram", **given, certificate=certificate)
    assert lm.sweep("pangram", 0.5).rows == lm.sweep("pangram", [0.5]).rows


def test_an_audit_is_recorded_and_changes_no_text(lm):
    log = offramp.AuditLog(share=1.0)
    options = {"threshold": 0.0, "confidence": "max_prob", "max_new_tokens": 8}
    assert lm.generate("the ", audit=log, **options).text == lm.generate("the ", **options).text
    assert log.content()["audited"] == 7  # the first new token is that of the prompt
    assert 0 < log.content()["disagreement"]["upper"] <= 7 / 8


def test_a_promise_is_kept_by_a_log_and_needs_exits_that_tokens_may_take(lm):
    log = offramp.AuditLog(share=1.0, keep_promise=0.5)
    for given, got in (({}, "neither"), ({"speculative": True}, "drafts")):
        with pytest.raises(
            offramp.ConfigError, match=f"keep_promise: expected a threshold .*{got}"
        ):
            lm.generate("the ", audit=log, **given)
    options = {"threshold": 0.0, "confidence": "max_prob", "max_new_tokens": 8}
    assert len(lm.generate("the ", audit=log, **options).text) > 0
    content = log.content()
    assert 0 < content["tokens_left"] < 7  # the first of them would have broken it
    assert content["disagreement"]["upper"] <= 0.5


def test_a_certificate_on_generation_from_python(lm):
    few = {"max_prompts": 12, "prompt_tokens": 6, "max_new_tokens": 6, "steps": 3}
    certificate = lm.certify("pangram", on="generation", epsilon=0.4, **few)
    assert certificate.n == 12
    assert certificate.on_generation


def test_gates_are_fitted_in_memory_and_saved(lm, tmp_path):
    with pytest.raises(offramp.ConfigError, match="gain"):
        lm.sweep("pangram", confidence="gain")
    fitted = lm.fit("pangram")
    table = fitted.sweep("pangram", [-0.1], confidence="gain")
    fitted.save(tmp_path / "fitted")
    assert offramp.load(tmp_path / "fitted").sweep("pangram", [-0.1], confidence="gain").rows == (
        table.rows
    )
    with pytest.raises(offramp.ConfigError, match="gain"):  # the first model has none still
        lm.sweep("pangram", confidence="gain")


def test_a_benchmark_has_a_row_a_method(lm):
    table = lm.bench("pangram", prompts=1, repeats=1, max_new_tokens=4, peers=False)
    assert {"full", "speculative@1"} <= {row.method for row in table.rows}
    assert table.plot().to_dict()["layer"]


def test_a_model_of_transformers_in_memory_gets_exits(checkpoint, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    backend = offramp.load(checkpoint).tokenizer
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    text = str(checkpoint / "text.txt")
    plain = offramp.load(model, tokenizer=tokenizer, exits=[2])
    assert plain.exit_layers == (2, 4)
    assert not plain.exits_trained
    before = [value.clone() for value in model.parameters()]
    tuned = offramp.tune(
        model, text, tokenizer=tokenizer, exits=[2], seq_len=32, epochs=1, out=tmp_path / "tuned"
    )
    assert tuned.exits_trained
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert tuned.sweep(text, [0.5]).rows == offramp.load(tmp_path / "tuned").sweep(text, [0.5]).rows


def test_a_checkpoint_is_tuned_into_a_folder_that_names_it(checkpoint, tmp_path):
    text = str(checkpoint / "text.txt")
    lm = offramp.tune(checkpoint, text, exits=[1], seq_len=32, epochs=1, exit_head="norm")
    lm.save(tmp_path / "kept")
    about = json.loads((tmp_path / "kept" / "offramp.json").read_text())
    assert about["base"]["folder"] == str(checkpoint.resolve())
    assert about["trained"]["exit_head"] == "norm"
    assert not (tmp_path / "kept" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda lm: lm.generate("The ", treshold=0.5), "treshold: .* perhaps threshold"),
        (lambda lm: lm.generate("The ", threshold="high"), "threshold: expected a number"),
        (lambda lm: lm.generate("The ", max_new_tokens="5"), "max_new_tokens: .* whole number"),
        (lambda lm: lm.generate("The ", speculative=1), "speculative: expected True or False"),
        (lambda lm: offramp.train("pangram", exits=["2"]), "exits: .* list of whole num"),
        (lambda lm: offramp.train("pangram", schedule="cos"), "schedule: expected 'constant' or"),
        (lambda lm: lm.certify("pangram", epsilon=2), "epsilon: expected"),
        (lambda lm: lm.bench("pangram", prompt=1), "prompt: .* perhaps prompts"),
        (lambda lm: lm.sweep("nowhere.txt"), "nowhere.txt: expected"),
        (lambda lm: offramp.load(lm.model, tokenizer=lm.tokenizer, exits=[1]), "exits: expected n"),
        (lambda lm: offramp.load(lm.model, tokenizer=lm.tokenizer, device="cpu"), "device: exp"),
        (lambda lm: offramp.load(torch.nn.Linear(2, 2), tokenizer=lm.tokenizer), "a causal lang"),
        (lambda lm: offramp.load("pangram", exits="12"), "exits: expected a list of whole"),
        (lambda lm: offramp.train("pangram", layers=2, num_hidden_layers=3), "two names of one"),
        (lambda lm: offramp.train("pangram", layer=3), "layer: .* perhaps layers"),
        (lambda lm: offramp.train("pangram", steps=0), "steps: expected at least 1"),
        (lambda lm: offramp.load("no/such/folder"), "no/such/folder: expected"),
        (lambda lm: offramp.load(lm.model), "tokenizer: expected"),
        (lambda lm: offramp.load("x", tokenizer=lm.tokenizer), "tokenizer: expected none"),
        (lambda lm: offramp.study("alfa", "pangram", out="x"), "study: expected one of"),
    ],
)
def test_a_mistake_is_one_sentence(lm, call, sentence):
    with pytest.raises(offramp.OfframpError, match=sentence) as raised:
        call(lm)
    assert "\n" not in str(raised.value)


def test_what_holds_texts_or_tensors_is_shown_in_a_line(lm):
    corpus = offramp.load_corpus("pangram")
    assert repr(corpus) == "Corpus('pangram': train 100,000, validation 10,000 characters)"
    text = StudyText(train="a" * 10**6, held_out="b", test="c", about={})
    fitted = FittedExits(gates={"gain": {1: Gate(16)}}, draft_vocab=torch.arange(5000))
    trace = MeasuredText(
        opened=open_model(lm._opened.name), corpus=corpus, ids=torch.arange(20) % 9, read="whole"
    )
    for value in (text, fitted, trace, trace.trace(()), lm.generate("The "), lm):
        assert len(repr(value)) < 250
        assert "\n" not in repr(value)


def test_an_engine_continues_each_text_as_generate_does(checkpoint):
    lm = offramp.load(checkpoint)
    lm.model.silence_untrained()
    engine = lm.engine(slots=2, capacity=40, waiting=1)
    options = [
        {"max_new_tokens": 6},
        {"max_new_tokens": 3, "threshold": 0.5},
        {"speculative": True},
    ]
    options[2]["max_new_tokens"] = 9
    requests = [engine.submit_text("quick brown", id=str(n), **o) for n, o in enumerate(options)]
    with pytest.raises(offramp.QueueFullError, match=r"^queue: expected at most 1 waiting"):
        engine.submit_text("quick")
    with pytest.raises(offramp.ConfigError, match=r"^slots: expected at least 1, got 0$"):
        lm.engine(slots=0)
    assert {event.request for event in engine.run()} == set(requests)
    for request, chosen in zip(requests, options, strict=True):
        assert request.completion.text == lm.generate("quick brown", **chosen).text
