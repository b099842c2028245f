"""LoRA in a trainer with exits: adapter and exits are saved, opened, resumed and merged."""

import importlib
import json
import shutil

import pytest
import torch
from torch.testing import assert_close

import offramp
from offramp.errors import CheckpointError, ConfigError
from offramp.models.base import whole_step
from offramp.models.huggingface import adapter
from offramp.training import ExitLossMixin

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# the libraries use names that transformers has replaced
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class ExitTrainer(ExitLossMixin, transformers.Trainer):
    pass


def lora(checkpoint, **fields):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    usual = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**{**usual, **fields}))


def trainer_of(model, folder, ids, **fields):
    rows = [{"input_ids": row, "labels": row} for row in ids[:128].view(8, 16).tolist()]
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_steps=4,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        **fields,
    )
    return ExitTrainer(model, args, train_dataset=rows, exits=[1, 2], exit_head="norm")


def logits_of(model, ids):
    layers = list(model.exit_layers)
    with torch.no_grad():
        states = model.states_at(ids, layers, step=whole_step(ids))
        return {layer: model.unembed(h, layer) for layer, h in states}


@pytest.fixture(scope="module")
def ids():
    random = torch.Generator().manual_seed(0)
    return torch.randint(20, (400,), generator=random)


@pytest.fixture(scope="module")
def trained(checkpoint, ids, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    trainer = trainer_of(lora(checkpoint), folder, ids)
    trainer.train()
    return trainer, folder / "checkpoint-4"


def test_adapter_and_exits_learn_and_nothing_else(trained, checkpoint):
    trainer, _ = trained
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    for name, value in trainer.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, plain[name.replace(".base_layer", "")]), name
    assert all(
        value.abs().sum() > 0
        for name, value in trainer.model.named_parameters()
        if "lora_B" in name
    )
    assert not torch.equal(trainer.exit_model.exits["1"].norm.weight, plain["model.norm.weight"])


def test_load_merges_the_adapter_once(trained, checkpoint, ids, monkeypatch):
    trainer, folder = trained
    assert sorted(path.name for path in folder.iterdir() if "adapter" in path.name) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not (folder / "model.safetensors").exists()
    expected = logits_of(trainer.exit_model.eval(), ids[None, :9])
    lm = offramp.load(folder)
    assert lm.exit_layers == (1, 2, 4)
    for layer, logits in logits_of(lm.model, ids[None, :9]).items():
        assert_close(logits, expected[layer], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(adapter, "_merge", None)  # it is kept
    assert offramp.load(folder, base=checkpoint).sha256 == lm.sha256


def test_a_loaded_model_is_saved_merged(trained, ids, tmp_path):
    _, folder = trained
    lm = offramp.load(folder)
    lm.save(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    again = offramp.load(tmp_path / "merged")
    assert again.sha256 == lm.sha256
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = logits_of(lm.model, ids[None, :9])[4]
    assert_close(plain(ids[None, :9]).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_model_in_memory_with_an_adapter_is_not_saved(trained, checkpoint, tmp_path):
    trainer, _ = trained
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint / "tokenizer.json")
    )
    lm = offramp.load(trainer.exit_model, tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match="expected a model without an adapter to save"):
        lm.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_resumed_run_ends_with_the_same_parameters(trained, checkpoint, ids, tmp_path):
    whole, folder = trained
    again = trainer_of(lora(checkpoint), tmp_path, ids)
    again.train(resume_from_checkpoint=str(folder.with_name("checkpoint-2")))
    for model, other in ((again.model, whole.model), (again.exit_model, whole.exit_model)):
        expected = other.state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_a_changed_adapter_is_refused(trained, tmp_path):
    _, folder = trained
    copy = shutil.copytree(folder, tmp_path / "copy")
    about = json.loads((copy / "offramp.json").read_text())
    assert about["base"]["adapter_sha256"]
    about["base"]["id"] = about["base"]["folder"]
    (copy / "offramp.json").write_text(json.dumps(about))
    offramp.load(copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: expected the adapter of"):
        offramp.load(copy)
    (copy / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        offramp.load(copy)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, r"peft_type: expected LORA, got 'LOHA'; merge it"),
        ({"peft_type": "LORA", "r": "many"}, "its adapter cannot be merged into"),
        ({"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}, "its adapter cannot be"),
        ([], "peft_type: expected LORA"),
    ],
)
def test_a_hostile_adapter_is_one_sentence(trained, tmp_path, config, message):
    _, folder = trained
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "adapter_config.json").write_text(json.dumps(config))
    about = json.loads((copy / "offramp.json").read_text())
    about["base"] |= adapter.adapter_hashes(copy) | {"id": about["base"]["folder"]}
    (copy / "offramp.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=message):
        offramp.load(copy)


def test_without_peft_one_sentence_names_the_extra(trained, tmp_path, monkeypatch):
    _, folder = trained
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    found = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name: found("no_" + name if name == "peft" else name)
    )
    with pytest.raises(CheckpointError, match=r"pip install 'offramp\[lora\]'$"):
        offramp.load(folder)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda checkpoint: lora(checkpoint, target_modules=["q_proj", "lm_head"]),
            "leaves the LM head as it is",
        ),
        (
            lambda checkpoint: peft.get_peft_model(
                transformers.AutoModelForCausalLM.from_pretrained(checkpoint),
                peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            ),
            "got one that learns a prompt",
        ),
        (
            lambda checkpoint: peft.get_peft_model(
                transformers.AutoModelForCausalLM.from_config(
                    transformers.AutoConfig.from_pretrained(checkpoint)
                ),
                peft.LoraConfig(r=2, target_modules=["q_proj"]),
            ),
            "which the saved folder can name, .* is another one than the model's",
        ),
    ],
)
def test_an_adapter_that_cannot_be_used_is_one_sentence(checkpoint, ids, tmp_path, make, message):
    with pytest.raises(ConfigError, match=message):
        trainer_of(make(checkpoint), tmp_path, ids)
