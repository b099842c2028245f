"""offramp quantise, and --weights of the commands that read a model."""

import json
import shutil

import pytest
import torch

from offramp import load
from offramp.errors import ConfigError
from offramp.exits.gate import FittedExits, Gate
from offramp.models.fitted import save_fitted
from offramp.models.model_files import find_model
from offramp.models.native.schemes import SCHEMES

SHORT = ("7 quick", "--max-new-tokens", 6, "--json")


def ran(result):
    assert result.returncode == 0, result.stderr
    return result


def refused(result, *expected):
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    for part in expected:
        assert part in result.stderr.splitlines()[-1], result.stderr


@pytest.fixture(scope="module")
def made(offramp, checkpoint, trained, tmp_path_factory):
    """A checkpoint, exits for it with gates, and a model of offramp train; each quantised, too."""
    folder = tmp_path_factory.mktemp("quantised")
    shutil.copytree(checkpoint, folder / "base")
    shutil.copytree(trained, folder / "native")
    text, small = folder / "base" / "text.txt", folder / "small.txt"
    small.write_text(text.read_text()[:900])
    ran(
        offramp(
            *("tune", folder / "base", "--corpus", text, "--exits", "1,2", "--seq-len", 32),
            *("--exit-head", "full", "--epochs", 1, "--out", folder / "tuned"),
        )
    )
    gates = {1: Gate(32, outputs=2), 2: Gate(32, outputs=1)}
    exits = find_model(folder / "tuned").exits_sha256
    save_fitted(FittedExits(gates={"gain": gates}), folder / "tuned", exits=exits)
    for name, scheme in {"base": "int4", "tuned": "int8", "native": "int4"}.items():
        ran(
            offramp(
                *("quantise", folder / name, "--weights", scheme),
                *("--out", folder / f"{name}-{scheme}"),
            )
        )
    return folder


PAIRS = [("base", "int4"), ("tuned", "int8"), ("native", "int4")]


@pytest.mark.parametrize(("name", "scheme"), PAIRS)
def test_quantised_ahead_and_at_load_are_the_same_model(made, name, scheme):
    ahead, at_load = load(made / f"{name}-{scheme}"), load(made / name, weights=scheme)
    numbers = load(made / name)
    assert ahead.sha256 == at_load.sha256 != numbers.sha256
    mine, theirs = (lm.model.state_dict() for lm in (ahead, at_load))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    assert ahead.exit_layers == numbers.exit_layers
    assert ahead.exits_trained == numbers.exits_trained
    one, other, plain = (lm._opened for lm in (ahead, at_load, numbers))
    assert one.first_tokens == other.first_tokens == plain.first_tokens
    assert one.end_tokens == other.end_tokens == plain.end_tokens
    assert one.record.corpora == plain.record.corpora
    assert one.window == plain.window
    assert one.fitted.gates.keys() == plain.fitted.gates.keys()
    texts = [list(lm.generate("7 quick", max_new_tokens=8)) for lm in (ahead, at_load)]
    assert [token.id for token in texts[0]] == [token.id for token in texts[1]]


@pytest.mark.parametrize(("name", "scheme"), PAIRS)
def test_the_hash_does_not_depend_on_the_precision_beside(made, name, scheme):
    found = {
        load(made / folder, dtype=dtype, **weights).sha256
        for folder, weights in ((f"{name}-{scheme}", {}), (name, {"weights": scheme}))
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(found) == 1


def test_formats_are_different_models(made):
    hashes = {load(made / "native", weights=scheme).sha256 for scheme in SCHEMES}
    assert len(hashes | {load(made / "native").sha256}) == 3


def test_a_change_of_anything_is_another_model(made, tmp_path):
    from safetensors.torch import load_file, save_file

    from offramp.models.native.checkpoint import weights_about

    for name in (
        "lm_head.values",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.scales",
    ):
        copy = shutil.copytree(made / "base-int4", tmp_path / name)
        about = weights_about(copy)
        assert about["weight_format"] == "int4"
        state = load_file(copy / "model.safetensors")
        state[name].view(torch.uint8)[0, 0] ^= 1
        save_file(state, copy / "model.safetensors", metadata=about)
        assert load(copy).sha256 != load(made / "base-int4").sha256


def test_from_python_save_keeps_what_load_quantised(made, tmp_path):
    lm = load(made / "tuned", weights="int8")
    before = lm.sha256
    lm.save(tmp_path / "small")
    assert lm.sha256 == before == load(tmp_path / "small").sha256
    again = load(tmp_path / "small")
    again.save(tmp_path / "copy")
    assert load(tmp_path / "copy").sha256 == before
    gates = load(tmp_path / "copy")._opened.fitted.gates
    assert set(gates) == {"gain"}
    with pytest.raises(ConfigError, match="weights: expected int8 or int4, got 'int3'"):
        load(made / "tuned", weights="int3")
    with pytest.raises(ConfigError, match="weights: expected none with a model in memory"):
        load(lm.model, tokenizer=lm.tokenizer, weights="int8")
    assert "int8 weights" in repr(again)


def test_models_in_memory_with_quantised_weights(made, tmp_path):
    """They are opened and saved."""
    lm = load(made / "native", weights="int4")
    memory = load(lm.model, tokenizer=lm.tokenizer)
    assert memory.sha256 == lm.sha256
    memory.save(tmp_path / "saved")
    assert load(tmp_path / "saved").sha256 == lm.sha256


READERS = {
    "generate": (*SHORT[:1], "--max-new-tokens", 4),
    "sweep": ("--corpus", "TEXT"),
    "probe": ("--corpus", "TEXT", "--tokens", 60),
    "calibrate": ("--corpus", "TEXT", "--epsilon", 0.9, "--delta", 0.4),
    "confidence": ("--corpus", "TEXT"),
    "bench": (
        *("--corpus", "TEXT", "--prompts", 1, "--repeats", 1, "--prompt-tokens", 8),
        *("--max-new-tokens", 4, "--no-peers"),
    ),
}


@pytest.mark.parametrize("command", READERS)
def test_every_command_that_reads_a_model_takes_weights(offramp, made, command):
    text = made / "small.txt"
    words = [text if word == "TEXT" else word for word in READERS[command]]
    at_load = ran(offramp(command, made / "tuned", *words, "--weights", "int8"))
    said = ": int8 weights in attention, MLP and LM heads; everything else in float32."
    assert said in at_load.stderr
    if command != "bench":  # which takes long
        ahead = ran(offramp(command, made / "tuned-int8", *words))
        assert said in ahead.stderr
        assert ahead.stdout == at_load.stdout
        assert said not in ran(offramp(command, made / "tuned", *words)).stderr


def test_flops_do_not_depend_on_the_format(offramp, made, tmp_path):
    rows = {}
    for name, more in {"numbers": (), "int8": ("--weights", "int8")}.items():
        out = tmp_path / f"{name}.json"
        ran(
            offramp(
                *("sweep", made / "tuned", "--corpus", made / "small.txt"),
                *("--thresholds", "0", "--out", out, *more),
            )
        )
        content = json.loads(out.read_text())
        rows[name] = content["rows"][0]["flops_pct"]
        assert content.get("weights") == (None if name == "numbers" else name)
    assert rows["int8"] == rows["numbers"]


def test_a_certificate_is_of_one_format(offramp, made, tmp_path):
    out = tmp_path / "certificate.json"
    calibrate = ("--corpus", made / "small.txt", "--epsilon", 0.9, "--delta", 0.4, "--out", out)
    ran(offramp("calibrate", made / "native", *calibrate))
    use = ("--certificate", out)
    ran(offramp("generate", made / "native", *SHORT, *use))
    expected = "certificate: expected one for this model with int4 weights, sha256 "
    refused(offramp("generate", made / "native", *SHORT, *use, "--weights", "int4"), expected)
    refused(offramp("generate", made / "native-int4", *SHORT, *use), expected)

    ran(offramp("calibrate", made / "native", *calibrate, "--weights", "int4"))
    ran(offramp("generate", made / "native-int4", *SHORT, *use))
    ran(
        offramp("sweep", made / "native", "--corpus", made / "small.txt", *use, "--weights", "int4")
    )
    other = ("--weights", "int8")
    refused(offramp("generate", made / "native", *SHORT, *use, *other), "with int4 weights")
    refused(offramp("generate", made / "native", *SHORT, *use), "with int4 weights")
    check = ("--corpus", made / "small.txt", "--check", out)
    ran(offramp("calibrate", made / "native-int4", *check))


def test_what_is_printed_names_the_parts(offramp, made, tmp_path):
    said = "int4 weights in attention and MLP, int8 in LM heads"
    assert said in ran(offramp("generate", made / "native-int4", *SHORT)).stderr
    out = tmp_path / "small"
    result = ran(offramp("quantise", made / "native", "--weights", "int4", "--out", out))
    assert f"holds the model with {said}: " in result.stderr
    assert " MB of weights, " in result.stderr


def test_dtype_is_the_precision_beside(offramp, made):
    result = ran(
        offramp("generate", made / "native-int4", *SHORT, "--dtype", "bfloat16", "--speculative")
    )
    assert "everything else in bfloat16." in result.stderr
    for folder, more in (("native-int4", ()), ("native", ("--weights", "int8"))):
        result = offramp("sweep", made / folder, "--corpus", "pangram", *more, "--dtype", "float64")
        refused(result, "dtype: expected float32 or bfloat16 with int")


def test_a_chat_template_stays(offramp, made, tmp_path):
    base = shutil.copytree(made / "base", tmp_path / "base")
    (base / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": "{% for m in messages %}{{ m['content'] }}!{% endfor %}",
            }
        )
    )
    small = tmp_path / "small"
    ran(offramp("quantise", base, "--weights", "int8", "--out", small))
    texts = [
        ran(offramp("generate", folder, *SHORT, "--chat", *more)).stdout
        for folder, more in ((small, ()), (base, ("--weights", "int8")))
    ]
    first, second = (json.loads(text)["text"] for text in texts)
    assert first == second


BAD = {
    "int8 on int4": ("generate", "native-int4", "7", "--weights", "int8"),
    "int4 on int4": ("sweep", "native-int4", "--corpus", "TEXT", "--weights", "int4"),
    "quantise": ("quantise", "native-int4", "--weights", "int8", "--out", "OUT"),
    "tune": ("tune", "native-int4", "--corpus", "TEXT", "--out", "OUT"),
    "tune --kv-source": (
        *("tune", "native-int4", "--corpus", "TEXT", "--kv-source", 1, "--out", "OUT"),
    ),
    "specialise": ("specialise", "native-int4", "--corpus", "TEXT", "--out", "OUT"),
    "export": ("export", "native-int4", "--exit", 1, "--out", "OUT"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_needs_numbers_is_refused_before_the_work(offramp, made, tmp_path, case):
    out = tmp_path / "out"
    places = {"TEXT": made / "small.txt", "OUT": out, "native-int4": made / "native-int4"}
    result = offramp(*(places.get(word, word) for word in BAD[case]))
    refused(result, "expected a model whose weights are not quantised", "got int4 weights")
    assert not out.exists()


def test_gates_are_fitted_to_a_quantised_model(offramp, made, tmp_path):
    model = shutil.copytree(made / "native-int4", tmp_path / "model")
    small = made / "small.txt"
    fit = ("--corpus", small, "--fit", small)
    before = load(model).sha256
    ran(offramp("confidence", model, *fit))
    assert load(model).sha256 != before
    ran(offramp("sweep", model, "--corpus", small, "--confidence", "gain", "--thresholds=-0.1"))
    refused(
        offramp("confidence", made / "native", *fit, "--weights", "int8"),
        "weights: expected none with --fit",
    )


def test_a_run_is_not_continued_in_a_quantised_folder(offramp, made):
    result = offramp("train", "--resume", made / "native-int4")
    refused(result, str(made / "native-int4"))


def test_a_model_of_another_runner_is_refused(offramp, made, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "gpt2"
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=0
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copy(made / "base" / "tokenizer.json", folder)
    expected = ("weights: expected none for", "since only the native decoder runs int8 weights")
    refused(offramp("generate", folder, "7", "--weights", "int8"), *expected, "gpt2")
    out = tmp_path / "out"
    refused(offramp("quantise", folder, "--weights", "int8", "--out", out), *expected)
    assert not out.exists()


def test_weights_that_are_not_finite_are_refused(offramp, made, tmp_path):
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(made / "native", tmp_path / "model")
    state = load_file(model / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(state, model / "model.safetensors")
    out = tmp_path / "out"
    for command in (
        ("quantise", model, "--weights", "int4", "--out", out),
        ("generate", model, "7", "--weights", "int4"),
    ):
        refused(offramp(*command), "model.layers.1.mlp.down_proj", "finite")
    assert not out.exists()


def test_a_folder_that_is_not_empty_stays(offramp, made, tmp_path):
    (tmp_path / "kept").write_text("kept")
    result = offramp("quantise", made / "native", "--weights", "int8", "--out", tmp_path)
    refused(result, "expected a new or empty folder")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
