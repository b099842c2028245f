"""The exits learn in TRL's SFTTrainer."""

import pytest
import torch
from torch.testing import assert_close

import offramp
from offramp.errors import ConfigError
from offramp.training import ExitLossMixin

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

# the libraries use names that transformers has replaced
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TEXTS = [f"{number} quick brown foxes jump." for number in range(0, 800, 100)]


class ExitSFT(ExitLossMixin, trl.SFTTrainer):
    pass


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint / "tokenizer.json"), pad_token=".", eos_token="."
    )


def sft(kind, checkpoint, tokenizer, folder, *, texts=TEXTS, data=None, fields=None, **options):
    args = trl.SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        bf16=False,
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        save_strategy="no",
        **(fields or {}),
    )
    return kind(
        model=transformers.AutoModelForCausalLM.from_pretrained(checkpoint),
        args=args,
        train_dataset=datasets.Dataset.from_dict(data or {"text": texts}),
        processing_class=tokenizer,
        **options,
    )


def logged(trainer, name="loss"):
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize(
    "data",
    [
        {"text": TEXTS},
        {"prompt": [text[:8] for text in TEXTS], "completion": [text[8:] for text in TEXTS]},
    ],
    ids=["text", "prompts"],
)
def test_the_standard_objective_is_that_of_sft(checkpoint, tokenizer, tmp_path, data):
    plain = sft(trl.SFTTrainer, checkpoint, tokenizer, tmp_path / "plain", data=data)
    plain.train()
    ours = sft(
        ExitSFT,
        checkpoint,
        tokenizer,
        tmp_path / "ours",
        data=data,
        exits=[2],
        exit_head="shared",
        loss_weights="standard",
    )
    ours.train()
    assert logged(ours) == pytest.approx(logged(plain), rel=1e-5)
    expected = dict(plain.model.named_parameters())
    for name, value in ours.model.named_parameters():
        assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_exits_and_lora_learn_and_are_opened_by_load(checkpoint, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    trainer = sft(
        ExitSFT,
        checkpoint,
        tokenizer,
        tmp_path / "run",
        exits=[1, 2],
        loss_weights="asymmetric_exits:0.5",
        peft_config=peft.LoraConfig(r=2, target_modules="all-linear"),
        eval_dataset=datasets.Dataset.from_dict({"text": TEXTS[:3]}),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for layer in (1, 2, 4):
        assert after[f"eval_exit_{layer}_loss"] < before[f"eval_exit_{layer}_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    lm = offramp.load(tmp_path / "saved")
    assert lm.exit_layers == (1, 2, 4)
    assert not any("exits" in name for name in trainer.model.state_dict())
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    expected = trainer.model.eval()(ids).logits
    assert_close(lm.model.to_transformers()(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_packed_texts_have_the_loss_of_padded_ones(checkpoint, tokenizer, tmp_path):
    found = []
    for number, fields in enumerate(
        ({"max_length": 64}, {"max_length": 64, "packing": True, "packing_strategy": "bfd"})
    ):
        trainer = sft(
            ExitSFT,
            checkpoint,
            tokenizer,
            tmp_path / str(number),
            fields={**fields, "eval_packing": bool(number)},
            eval_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
            exits=[2],
        )
        found.append(trainer.evaluate())
    for layer in (2, 4):
        name = f"eval_exit_{layer}_loss"
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5)


def test_another_loss_of_sft_is_refused(checkpoint, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"^loss_type: expected the default of the trainer"):
        sft(ExitSFT, checkpoint, tokenizer, tmp_path, fields={"loss_type": "dft"}, exits=[2])
