"""Certificates on texts that the model writes itself."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from offramp.calibration.certificate import Certificate
from offramp.calibration.promise import Promise
from offramp.commands.on_generation.certify import (
    certify_generation,
    certify_texts,
    check_generation,
)
from offramp.commands.on_generation.config import Prompts, WriteConfig
from offramp.commands.on_generation.writer import Writer, prompts_of_file, prompts_of_text
from offramp.data.tokenizer import make_tokenizer
from offramp.errors import CertificateError, ConfigError
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
from offramp.models.base import whole_step
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.models.open import open_in_memory

TEXT = "".join(f"{n} quick brown foxes jump over {n * 7 % 31} lazy dogs. " for n in range(200))
CONFIG = WriteConfig(prompt_tokens=8, max_new_tokens=10, max_prompts=24, rows=5, steps=6)
PATH = [[2.0], [0.06], [0.0]]
"""No token leaves, some leave, all leave: the model is not trained, so its confidence is low."""


@pytest.fixture(scope="module")
def opened():
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        exit_layers=(1, 3),
    )
    model = Transformer(config).eval()
    model.exits.trained = True
    found = open_in_memory(model, make_tokenizer("characters", TEXT))
    return found


@pytest.fixture(scope="module")
def prompts(opened, tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "text.txt"
    path.write_text(TEXT)
    return prompts_of_text(opened, str(path), CONFIG)


def writer(opened, prompts, **options):
    config = dataclasses.replace(CONFIG, **options)
    return Writer(opened, prompts, config, confidence="max_prob")


def test_texts_are_those_of_generate(opened, prompts):
    found = writer(opened, prompts).write((0.06,))
    config = GenerateConfig(max_new_tokens=10, threshold=0.06, confidence="max_prob")
    assert len(prompts.ids) == len(found.texts) == 24
    for ids, text in zip(prompts.ids, found.texts, strict=True):
        alone = generate(opened.model, ids, config, tokenizer=opened.tokenizer)
        assert [(t.id, t.exit_layer) for t in alone] == [(t.id, t.exit_layer) for t in text.tokens]


def test_losses_are_zero_at_full_depth_and_the_nll_is_that_of_the_model(opened, prompts):
    write = writer(opened, prompts)
    same, early = write.write((2.0,)), write.write((0.0,))
    for risk in ("divergence", "rouge-l", "nll-gap"):
        assert write.losses(same, risk).tolist() == [0.0] * 24
        losses = write.losses(early, risk)
        assert losses.min() >= 0
        assert losses.max() <= 1
    assert write.losses(early, "divergence").mean() > 0.3
    text = early.texts[0].ids
    assert write.losses(early, "nll-gap").max() > 0
    ids = torch.tensor([[*prompts.ids[0], *text]])
    with torch.no_grad():
        step = whole_step(ids[:, :-1])
        h = opened.model.embed(ids[:, :-1], step=step)
        logits = opened.model.unembed(opened.model.run_layers(h, 0, 3, step=step), 3)
    expected = -logits.log_softmax(-1)[0, -len(text) :].gather(1, ids[0, -len(text) :, None]).mean()
    nll = write._mean_nll(early.texts, range(24))  # five rows at a time
    assert nll[0] == pytest.approx(float(expected), abs=1e-5)
    alone = [write._mean_nll(early.texts, [n])[n] for n in range(24)]
    assert [*map(nll.get, range(24))] == pytest.approx(alone, abs=1e-6)


def test_each_text_of_full_depth_is_scored_once(opened, prompts, monkeypatch):
    write = writer(opened, prompts)
    early, bolder = write.write((0.06,)), write.write((0.0,))
    first = write.losses(early, "nll-gap")
    scored = []
    real = Writer._mean_nll
    monkeypatch.setattr(
        Writer,
        "_mean_nll",
        lambda self, texts, chosen: (
            scored.append((texts, len(chosen))) or real(self, texts, chosen)
        ),
    )
    assert write.losses(early, "nll-gap").tolist() == first.tolist()
    assert scored[0] == (write.full.texts, 0)
    other = [n for n in range(24) if early.texts[n].ids != write.full.texts[n].ids]
    assert scored[1] == (early.texts, len(other))
    write.losses(bolder, "nll-gap")
    assert scored[2][1] == 24 - len(other) < 24


def test_the_nll_of_texts_of_many_lengths(opened, prompts):
    uneven = dataclasses.replace(
        prompts, ids=[ids[: 3 + n % 3] for n, ids in enumerate(prompts.ids)]
    )
    config = dataclasses.replace(CONFIG, max_new_tokens=6)
    write = Writer(opened, uneven, config, confidence="max_prob")
    texts = write.write((0.0,)).texts
    for n, text in enumerate(texts):
        del text.tokens[1 + n % 5 :]
    found = write._mean_nll(texts, range(24))
    alone = [write._mean_nll(texts, [n])[n] for n in range(24)]
    assert [found[n] for n in range(24)] == pytest.approx(alone, abs=1e-6)


def test_testing_stops_at_the_first_failure(opened, prompts):
    promise = Promise(on="generation", epsilon=0.3)
    found, steps, full = certify_generation(
        opened, prompts, promise, CONFIG, confidence="max_prob", path=[[3.0], [2.0], [0.0], [-1.0]]
    )
    assert found.thresholds == (2.0,)
    assert [step.loss == 0 for step in steps] == [True, True, False]  # -1 was never written
    assert len(full.texts) == 24
    assert found.p_values == tuple(step.p_value for step in steps)
    assert (found.n, found.risk, found.missing_kv) == (24, "divergence", "propagate")
    assert found.expected_compute_pct == 100
    assert found.on_generation
    assert "differs from full depth's is at most 0.3" in found.assumptions["promise"]


def test_a_bold_certificate_costs_less_and_names_missing_kv(opened, prompts):
    promise = Promise(on="generation", epsilon=0.9999, delta=0.5)
    [all_leave] = certify_generation(
        opened, prompts, promise, CONFIG, confidence="max_prob", path=[[0.0]]
    )[:1]
    if all_leave.is_full_model:  # every loss is 1: even this promise is not kept
        pytest.fail("expected a promise of nearly nothing to be kept")
    assert all_leave.missing_kv == "propagate"
    assert all_leave.expected_compute_pct < 50  # the first new token of a text runs all layers
    assert all_leave.expected_flops_pct < 100


@pytest.mark.parametrize("risk", ["divergence", "rouge-l", "nll-gap"])
def test_certificates_are_stored_and_checked(opened, prompts, risk, tmp_path):
    promise = Promise(on="generation", risk=risk, epsilon=0.3)
    found, _, _ = certify_generation(
        opened, prompts, promise, CONFIG, confidence="max_prob", path=PATH
    )
    found.save(tmp_path / "c.json")
    stored = Certificate.load(tmp_path / "c.json")
    assert stored == found
    checked = check_generation(opened, prompts, stored, CONFIG, level=0.05)
    assert checked["same_corpus"] is True
    assert checked["risk"] <= 0.3
    bold = dataclasses.replace(found, thresholds=(0.0,), epsilon=0.01).signed()
    broken = check_generation(opened, prompts, bold, CONFIG, level=0.05)
    assert broken["verdict"] == "broken"
    other = dataclasses.replace(found, model_sha256="0" * 64)
    with pytest.raises(CertificateError, match="expected one for this model"):
        check_generation(opened, prompts, other, CONFIG, level=0.05)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"risk": "disagreement"}, "risk: expected one of divergence"),
        ({"assumptions": {"sequence_tokens": True}}, "sequence_tokens: expected at least 1"),
        ({"assumptions": {"sequence_tokens": "9"}}, "sequence_tokens: expected at least 1"),
    ],
)
def test_a_hostile_certificate_is_refused(opened, prompts, change, said):
    found, _, _ = certify_generation(
        opened, prompts, Promise(on="generation", epsilon=0.3), CONFIG,
        confidence="max_prob", path=PATH[:1],
    )  # fmt: skip
    stored = {**found.content(), **change}
    stored["assumptions"] = {**found.assumptions, **change.get("assumptions", {})}
    with pytest.raises(ConfigError, match=said):
        Certificate(**{**stored, "thresholds": (math.inf,)})


def test_too_few_prompts_say_how_many_are_needed(opened, prompts):
    with pytest.raises(ConfigError, match=r"expected at least 59 for epsilon 0\.05"):
        certify_generation(
            opened, prompts, Promise(on="generation", epsilon=0.05), CONFIG, confidence="max_prob"
        )


def test_prompts_of_a_file(opened, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(f"{n} lazy dogs") for n in range(30)))
    found = prompts_of_file(opened, path, CONFIG)
    assert len(found.ids) == 24
    assert opened.tokenizer.decode(found.ids[3]).replace(" ", "") == "3lazydogs"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(ConfigError, match="chat: expected a model with a chat template"):
        prompts_of_file(opened, path, CONFIG)


def test_prompts_that_do_not_fit_are_named_before_any_text_is_written(opened, monkeypatch):
    monkeypatch.setattr(Writer, "write", lambda *_: pytest.fail("a text was written"))
    longest = opened.model.max_length
    ids = [[1] * 4] * 30
    promise = Promise(on="generation", epsilon=0.3)

    def certify(*others, **options):
        config = dataclasses.replace(CONFIG, **options)
        prompts = Prompts(ids=[*ids, *others], sha256="", about="")
        certify_generation(opened, prompts, promise, config, confidence="max_prob", path=PATH)

    with pytest.raises(ConfigError, match=f"10 new ones fit .* of {longest}, got {longest} in pr"):
        certify([1] * longest)
    with pytest.raises(ConfigError, match=f"from 1 to {longest - 9} tokens .* in prompt 32"):
        certify([1], [1] * (longest - 8))
    with pytest.raises(ConfigError, match=r"expected from 1 to .* got 0 in prompt 31"):
        certify([])
    with pytest.raises(ConfigError, match=f"max_new_tokens: expected at most {longest}, the model"):
        certify(max_new_tokens=longest + 1)
    with pytest.raises(pytest.fail.Exception, match="a text was written"):
        certify([1] * (longest - 9))


def test_from_python(opened, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    options = {**dataclasses.asdict(CONFIG), "on": "generation", "epsilon": 0.4}
    found = certify_texts(opened, path, options)
    assert np.isfinite(found.p_values).all()
    with pytest.raises(ConfigError, match="max_prompt"):
        certify_texts(opened, path, {"on": "generation", "max_prompt": 3})


def test_wrong_options_are_named():
    for name in ("max_prompts", "prompt_tokens", "max_new_tokens", "rows", "steps"):
        with pytest.raises(ConfigError, match=f"{name}: expected at least [12], got 0"):
            WriteConfig(**{name: 0})
    with pytest.raises(ConfigError, match="max_new_tokens: expected at least 2, got 1"):
        WriteConfig(max_new_tokens=1)  # no token could leave, so that every promise would hold
    with pytest.raises(ConfigError, match="missing_kv"):
        WriteConfig(missing_kv="never")
    with pytest.raises(ConfigError, match="on: expected text or generation"):
        Promise(on="x")
    assert Prompts(ids=[[1]], sha256="", about="").ids == [[1]]
