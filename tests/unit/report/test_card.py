"""A model card says what is known, and text from outside changes nothing in it."""

import re

import pytest
import yaml

from offramp.report.card import Backbone, CardFacts, is_generated, model_card
from offramp.report.card_markdown import code, escaped

HASH = "ab" * 32
FACTS = {
    "name": "me/model",
    "title": "model",
    "num_layers": 4,
    "exit_layers": (1, 2),
    "exit_head": "norm",
    "vocab_size": 1000,
    "precision": "float32",
    "weights": None,
    "sha256": HASH,
    "backbone": None,
    "exits_trained": True,
    "unfinished": False,
    "tuned": None,
    "trained": None,
    "specialised": None,
    "datasets": (),
    "license": None,
    "sweep": None,
    "certificate": None,
    "versions": {"offramp": "1.0"},
}


def card(**facts):
    return model_card(CardFacts(**{**FACTS, **facts}))


def metadata(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_what_is_unknown_is_not_mentioned():
    text = card()
    assert metadata(text) == {
        "library_name": "offramp",
        "pipeline_tag": "text-generation",
        "tags": ["offramp", "early-exit"],
    }
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert headings == ["model", "Use", "Model", "Versions"]
    for word in ("None", "null", "nan", "icense", "raining"):
        assert word not in text


def test_a_backbone_is_named_with_its_commit_and_hash():
    text = card(backbone=Backbone(name="meta/base", commit="c" * 40, sha256=HASH))
    assert metadata(text)["base_model"] == "meta/base"
    assert "[meta/base](https://huggingface.co/meta/base) at commit `" + "c" * 40 in text
    packaged = Backbone(name="smollm2-135m", commit=None, sha256=HASH, packaged=True)
    assert "base_model" not in metadata(card(backbone=packaged))
    assert "base_model" not in metadata(
        card(backbone=Backbone(name=None, commit=None, sha256=HASH))
    )


def test_the_record_of_training_is_told_with_its_figures():
    rows = [{"exit_layer": 1, "agreement": 0.5, "ppl": 12.0}, {"exit_layer": 4, "ppl": 5.0}]
    tuned = {
        "objective": "distill",
        "tokens": 50000,
        "corpus": {"name": "text.txt", "sha256": HASH, "read": "training split"},
        "held_out_tokens": 2500,
        "before": [{"exit_layer": 1, "agreement": 0.25, "ppl": 3e7}],
        "after": rows,
    }
    text = card(tuned=tuned)
    assert f"- text: text.txt, the training split, sha256 `{HASH}`" in text
    assert "the 2,500 tokens" in text
    assert "| 1 | 25.0% | 50.0% | 3.0e+07 | 12.00 |" in text
    assert "| 4 |  |  |  | 5.00 |" in text


@pytest.mark.parametrize(
    "hostile",
    [
        *({}, {"after": 5}, {"after": [5, None, {"exit_layer": "x"}]}, {"after": "text"}),
        {"before": {}, "after": [{"exit_layer": 1, "agreement": "high", "ppl": None}]},
        {"corpus": "x", "tokens": [1], "objective": {"a": 1}, "held_out_tokens": "many"},
        {"after": [{"exit_layer": 1, "agreement": float("nan"), "ppl": float("inf")}]},
    ],
)
def test_a_record_of_other_types_leaves_out_what_it_does_not_say(hostile):
    text = card(tuned=hostile, trained=hostile, specialised=hostile)
    assert "Traceback" not in text
    assert "nan" not in text


EVIL = [
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![x](http://evil.example/x.png)",
    "`code` **bold** _it_ ~~no~~ a|b",
    "line\n# heading\n---\nlicense: evil",
    "\x1b]0;title\x07 \u202e reversed",
    "http://evil.example www.evil.example a@evil.example",
    "&lt; &#60;",
    "x" * 5000,
]


@pytest.mark.parametrize("text", EVIL)
def test_text_from_outside_is_no_markup(text):
    found = escaped(text)
    assert "\n" not in found
    assert len(found) < 500
    assert not re.search(r"(?<!\\)[<>\[\]`|*!&@]", found)
    assert not re.search(r"(?<!\\):(?=//)|www\.", found)
    assert all(character.isprintable() for character in found)
    assert code(text).count("`") == 2


@pytest.mark.parametrize("text", EVIL)
def test_hostile_names_stay_in_their_places(text):
    corpus = {"name": text, "sha256": text, "read": text}
    sweep = {
        "confidence": text,
        "n_tokens": 5,
        "missing_kv": text,
        "seen_in_training": False,
        "corpus": corpus,
        "rows": [{"threshold": 0.5, "ppl": 3.0, "compute_pct": 50.0}],
    }
    tuned = {"corpus": corpus, "objective": text, "tokens": 1}
    found = card(title=text, tuned=tuned, license="mit", sweep=sweep, versions={"offramp": text})
    plain = card(title="t", tuned=tuned | {"corpus": {}}, license="mit", sweep=sweep)
    assert metadata(found) == metadata(plain)
    assert re.findall(r"^## .*$", found, re.MULTILINE) == re.findall(
        r"^## .*$", plain, re.MULTILINE
    )
    outside_code = re.sub(r"`[^`\n]*`", "", found)
    assert not re.search(r"(?<!\\)<(?!!-- offramp)", outside_code)


@pytest.mark.parametrize("license", ["mit", "yes", 'no: "x"', "- a", "'", "{}", "# c", "null", "1"])
def test_a_license_is_one_string_in_the_yaml(license):
    assert metadata(card(license=license))["license"] == license


def test_an_edited_card_is_no_longer_a_generated_one():
    text = card()
    assert is_generated(text)
    assert is_generated(text.replace("\n", "\r\n"))
    for edited in (text + "more", text.replace("4 layers", "5 layers"), text[:-10], "", "# Mine\n"):
        assert not is_generated(edited)
