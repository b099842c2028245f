"""An exit whose numbers are NaN is named at once, in one sentence, by every command."""

import math

import pytest
import torch

from offramp.errors import CheckpointError, GenerationError, TrainingError
from offramp.evaluation.trace import collect_trace
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
from offramp.models.native.config import DecoderConfig
from offramp.models.open import open_in_memory, open_model
from offramp.models.save import save_model
from offramp.training.config import TrainConfig
from offramp.training.loop import TrainingRun, new_model

LAYERS = 3


@pytest.fixture
def broken(checkpoint, tmp_path):
    """Make a model folder with NaN in an exit's own norm or in a block."""

    def make(where):
        tokenizer = open_model(checkpoint).tokenizer
        config = DecoderConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=16,
            num_hidden_layers=LAYERS,
            exit_layers=(1, 2),
            exit_head="norm",
        )
        model = new_model(config, seed=0).eval()
        with torch.no_grad():
            if where == "exit":
                model.exits["2"].norm.weight[3] = math.nan
            else:
                model.model.layers[1].mlp.down_proj.weight[3] = math.nan
        save_model(open_in_memory(model, tokenizer), tmp_path / where)
        return tmp_path / where

    return make


COMMANDS = {
    "sweep": ("--thresholds", "0.5,0.9", "--out", "OUT"),
    "probe": ("--tokens", 300, "--out", "OUT"),
    "confidence": ("--out", "OUT"),
    "confidence --fit": ("--fit", "TEXT"),
    "calibrate": ("--out", "OUT"),
    "bench": ("--prompts", 1, "--prompt-tokens", 8, "--max-new-tokens", 4, "--out", "OUT"),
    "specialise": ("--compute-budget", 60, "--out", "OUT"),
}


@pytest.mark.parametrize(
    ("command", "where"), [("sweep", "backbone"), *((command, "exit") for command in COMMANDS)]
)
def test_a_command_names_the_exit_and_writes_nothing(
    offramp, checkpoint, broken, tmp_path, command, where
):
    folder, out = broken(where), tmp_path / "out.json"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    text = tmp_path / "text.txt"
    flags = [{"OUT": out, "TEXT": text}.get(flag, flag) for flag in COMMANDS[command]]
    text.write_text((checkpoint / "text.txt").read_text() * 8)
    result = offramp(command.split()[0], folder, "--corpus", text, *flags)
    assert result.returncode == 2, result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("offramp: ")]
    layers = "2" if where == "exit" else "2, 3"
    assert f"exit layer {layers} of {LAYERS}: expected logits that are finite numbers" in line
    assert "threshold" not in line
    assert not result.stdout.strip()
    assert not out.exists()
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("flags", [("--threshold", 0.5), ("--speculative", "--draft-exit", 2)])
def test_generate_names_the_exit(offramp, broken, flags):
    result = offramp("generate", broken("exit"), "quick", "--max-new-tokens", 40, *flags)
    assert result.returncode == 2
    assert "exit layer 2: expected max_prob scores that are finite numbers" in result.stderr
    result = offramp("generate", broken("backbone"), "quick", *flags)
    assert result.returncode == 2
    assert "finite numbers" in result.stderr


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy", "saturation", "patience"])
def test_every_confidence_measure_names_it(broken, measure):
    model = open_model(broken("backbone" if measure == "saturation" else "exit")).model
    config = GenerateConfig(threshold=2.0, confidence=measure, max_new_tokens=8)
    with pytest.raises(GenerationError, match=r"exit layer [23]: expected"):
        for _ in generate(model, [1, 2, 3], config):
            pass


@pytest.mark.parametrize("command", ["tune", "sweep"])
def test_a_model_of_transformers_with_nan_is_not_called_another_architecture(
    offramp, checkpoint, tmp_path, command
):
    transformers = pytest.importorskip("transformers")
    folder, out = tmp_path / "gpt2", tmp_path / "out"
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=64)
    lm = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        lm.transformer.h[1].mlp.c_proj.weight[3] = math.nan
    lm.save_pretrained(folder)
    (folder / "tokenizer.json").write_text((checkpoint / "tokenizer.json").read_text())
    flags = ("--corpus", checkpoint / "text.txt", "--out", out)
    result = offramp(command, folder, *flags)
    assert result.returncode == 2
    assert "exit layer 3, the last: expected logits that are finite numbers" in result.stderr
    assert not out.exists()


def test_the_first_batch_is_enough(broken):
    model = open_model(broken("exit")).model

    def batches():
        yield torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
        raise AssertionError("a second batch was read")

    with pytest.raises(CheckpointError, match="exit layer 2 of 3"):
        collect_trace(model, batches())


def test_an_overflow_of_float16_names_the_precision(make_model, make_ids):
    model = make_model(dtype=torch.float16)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(60_000.0)
        model.model.layers[0].self_attn.o_proj.weight.fill_(60_000.0)
    ids = make_ids(1, 5)
    with pytest.raises(CheckpointError, match=r"nan: check the weights .* \(float16\)"):
        collect_trace(model, [(ids[:, :-1], ids[:, 1:])])


def test_a_validation_of_train_names_the_exit(make_model, make_ids):
    model = make_model(dtype=torch.float32, exit_layers=(1, 2), exit_head="norm")
    config = TrainConfig(loss_weights="3=1", steps=2, seq_len=4, batch_size=1, eval_every=1)
    ids = make_ids(1, 40)[0]
    run = TrainingRun(model, ids, ids, config)
    with torch.no_grad():
        model.exits["2"].norm.weight[0] = math.nan
    with pytest.raises(TrainingError, match="step 0: exit layer 2 of 3: expected logits"):
        run.validate()
