import json
import math
from dataclasses import fields, replace

import pytest

from offramp.calibration.certificate import Certificate
from offramp.calibration.certify import certify
from offramp.calibration.promise import Promise
from offramp.errors import CertificateError, CheckpointError
from offramp.evaluation.cost import ModelCost
from offramp.report.confidence import certificate_table

KEYS = [  # of the issue, in its order
    "model_sha256",
    "dtype",
    "corpus_sha256",
    "risk",
    "epsilon",
    "delta",
    "method",
    "confidence",
    "missing_kv",
    "n",
    "thresholds",
    "p_values",
    "expected_compute_pct",
    "expected_flops_pct",
    "assumptions",
    "sha256",
]


def sealed(trace, promise, **chosen):
    return certify(trace, promise, model_sha256="m", corpus_sha256="c", **chosen)


@pytest.fixture
def certificate(make_trace):
    cost = ModelCost(exit_layers=(1, 2), context=1.0, layers=(4.0, 4.0), heads={1: 1.0, 2: 1.0})
    return sealed(make_trace(400), Promise(epsilon=0.05), cost=cost)


def test_a_certificate_has_the_keys_of_the_format_and_comes_back(certificate, tmp_path):
    path = tmp_path / "certificate.json"
    certificate.save(path)
    assert list(json.loads(path.read_text())) == KEYS
    assert Certificate.load(path) == certificate
    assert len(certificate.sha256) == 64


def test_a_certificate_of_the_full_model_comes_back(make_trace, tmp_path):
    found = sealed(make_trace(10), Promise(), path=[(math.inf,), (0.5,)])
    found.save(tmp_path / "certificate.json")
    assert Certificate.load(tmp_path / "certificate.json") == found
    assert json.loads((tmp_path / "certificate.json").read_text())["thresholds"] == ["inf"]


def test_a_certificate_from_before_the_test_was_recorded_comes_back(certificate, tmp_path):
    assumptions = {k: v for k, v in certificate.assumptions.items() if k != "test"}
    old = replace(certificate, assumptions=assumptions).signed()
    old.save(tmp_path / "certificate.json")
    assert Certificate.load(tmp_path / "certificate.json") == old
    assert (
        certificate_table(old.content()).row_count
        == certificate_table(certificate.content()).row_count
    )


EDITS = {name: "other" for name in KEYS if name != "sha256"} | {
    "epsilon": 0.049,
    "delta": 0.01,
    "n": 401,
    "thresholds": [0.1],
    "p_values": [0.0],
    "expected_compute_pct": 1.0,
    "expected_flops_pct": None,
    "assumptions": {},
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_certificate_is_refused(certificate, tmp_path, name):
    path = tmp_path / "certificate.json"
    certificate.save(path)
    content = json.loads(path.read_text())
    assert content[name] != EDITS[name]
    path.write_text(json.dumps({**content, name: EDITS[name]}))
    with pytest.raises(CertificateError, match=rf"edited: .* file states '{certificate.sha256}"):
        Certificate.load(path)


def test_one_word_inside_the_assumptions_counts(certificate, tmp_path):
    path = tmp_path / "certificate.json"
    certificate.save(path)
    path.write_text(path.read_text().replace("Free-running", "No free-running"))
    with pytest.raises(CertificateError, match="edited"):
        Certificate.load(path)


@pytest.mark.parametrize("content", ["{}", "[]", '{"sha256": "0"}'])
def test_a_file_that_is_no_certificate_is_refused(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(CertificateError, match="expected a certificate with model_sha256"):
        Certificate.load(tmp_path / "c.json")


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="found none"):
        Certificate.load(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected readable JSON"):
        Certificate.load(tmp_path / "c.json")


def test_a_certificate_for_another_model_is_refused_with_both_hashes(certificate):
    certificate.require_model("m")
    with pytest.raises(CertificateError, match="sha256 other, got one for m"):
        certificate.require_model("other")


def test_every_field_is_in_the_file():
    assert [field.name for field in fields(Certificate)] == KEYS
