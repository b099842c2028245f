"""BOS: one rule in every command. It is context at the start of each window, and never scored."""

import json
import shutil

import pytest
import torch
import transformers
from tokenizers import Tokenizer, processors

import offramp
from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.task import prompts_of
from offramp.commands.generate import prompt_ids
from offramp.commands.sweep import sweep
from offramp.commands.text import read_text
from offramp.data import batches
from offramp.data.tokenizer import first_tokens
from offramp.data.windows import TokenWindows
from offramp.errors import CertificateError, ConfigError
from offramp.evaluation.trace import collect_trace
from offramp.models.open import open_in_memory, open_model

BOS = 5
pytestmark = pytest.mark.filterwarnings("ignore::offramp.models.exit_heads.UntrainedExitsWarning")


@pytest.fixture(scope="module")
def begun(checkpoint, tmp_path_factory):
    """The tiny checkpoint with a tokenizer that adds token 5 before a text and 6 after it."""
    folder = tmp_path_factory.mktemp("begun") / "model"
    shutil.copytree(checkpoint, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    first, last = (tokenizer.id_to_token(id) for id in (BOS, 6))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, BOS), (last, 6)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def plain(opened):
    opened.model.silence_untrained()
    return opened


def test_the_first_tokens_are_those_of_the_post_processor(begun, checkpoint):
    assert first_tokens(Tokenizer.from_file(str(begun / "tokenizer.json"))) == (BOS,)
    assert first_tokens(Tokenizer.from_file(str(checkpoint / "tokenizer.json"))) == ()


def test_auto_is_what_the_model_was_trained_with(begun, checkpoint, tmp_path):
    opened = open_model(begun)
    assert opened.first_tokens == (BOS,)
    assert opened.with_bos("no").first_tokens == ()
    assert open_model(checkpoint).first_tokens == ()
    lm = transformers.AutoModelForCausalLM.from_pretrained(begun)
    assert open_in_memory(lm, opened.tokenizer).first_tokens == (BOS,)
    own = offramp.train(
        begun / "text.txt",
        tokenizer=str(begun),
        out=tmp_path / "own",
        **{"layers": 2, "dim": 8, "heads": 2, "exits": [1], "steps": 1},
        **{"seq_len": 16, "batch_size": 2},
    )
    assert own._opened.first_tokens == ()  # trained on plain windows
    assert offramp.load(tmp_path / "own", bos="yes")._opened.first_tokens == (BOS,)


def test_yes_needs_a_token(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="bos: expected auto, yes or no, got 'maybe'"):
        offramp.load(checkpoint, bos="maybe")
    folder = tmp_path / "none"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": 3}))
    assert offramp.load(folder, bos="yes")._opened.first_tokens == (3,)
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": None}))
    with pytest.raises(ConfigError, match="bos: expected auto or no"):
        offramp.load(folder, bos="yes")


def test_the_same_tokens_are_scored_with_and_without(begun):
    """Each window's losses are those that the model gives after the first token."""
    with_bos = plain(open_model(begun))
    text = read_text(with_bos, str(begun / "text.txt")).first(150)
    trace = text.trace(("max_prob",))
    other = read_text(with_bos.with_bos("no"), str(begun / "text.txt")).first(150)
    assert trace.num_tokens == other.trace(("max_prob",)).num_tokens == 150
    assert trace.targets.tolist() == text.ids[1:].tolist()
    assert trace.nll.tolist() != other.trace(("max_prob",)).nll.tolist()
    length = with_bos.window
    assert length == with_bos.model.max_length - 1
    lm = transformers.AutoModelForCausalLM.from_pretrained(begun)
    ids = torch.cat((torch.tensor([BOS]), text.ids[:length]))[None]
    with torch.no_grad():
        scores = lm(ids).logits[0, 1:].log_softmax(-1)
    expected = -scores.gather(1, text.ids[1 : length + 1, None])[:, 0]
    torch.testing.assert_close(
        torch.from_numpy(trace.nll[-1, :length]), expected, rtol=1e-4, atol=1e-5
    )


def test_windows_begin_with_the_first_tokens_and_do_not_predict_them():
    ids = torch.arange(10, 31)
    [(inputs, targets), (rest, rest_targets)] = batches(ids, seq_len=8, batch_size=2, first=(1, 2))
    assert inputs.tolist() == [[1, 2, *range(10, 18)], [1, 2, *range(18, 26)]]
    assert targets.tolist() == [[*range(11, 19)], [*range(19, 27)]]
    assert (rest.tolist(), rest_targets.tolist()) == ([[1, 2, *range(26, 30)]], [[*range(27, 31)]])
    inputs, targets = TokenWindows(ids, seq_len=8, first=(1,)).batch([1])
    assert (inputs.tolist(), targets.tolist()) == ([[1, *range(18, 26)]], [[*range(19, 27)]])


def test_a_prompt_begins_as_a_window_does_so_a_threshold_means_the_same(begun):
    opened = plain(open_model(begun))
    ids = prompt_ids(opened, "7 quick")
    assert ids[0] == BOS
    assert ids[1:] == prompt_ids(opened.with_bos("no"), "7 quick")  # and nothing after the text
    assert prompt_ids(opened, opened.tokenizer.id_to_token(BOS) + "7")[:2] != [BOS, BOS]
    [prompt] = prompts_of(
        read_text(opened, str(begun / "text.txt")).ids,
        "text.txt",
        BenchConfig(prompts=1, prompt_tokens=8, max_new_tokens=2),
        max_length=64,
        first_tokens=opened.first_tokens,
    )
    assert prompt == [BOS, *prompt_ids(opened.with_bos("no"), "0 quick brown")[:7]]
    windows = [(torch.tensor([ids]), torch.tensor([ids[1:]]))]
    score = collect_trace(opened.model, windows, layers=(1, 4)).scores("max_prob")[0, -1]
    lm = offramp.load(begun, exits=1)
    first = [t.exit_layer for t in lm.generate("7 quick", threshold=0.0, max_new_tokens=2)]
    assert first == [4, 1]
    assert 0 < score < 1


def test_a_certificate_keeps_how_texts_began(begun, tmp_path):
    lm = offramp.load(begun, exits=2, bos="no")
    certificate = lm.certify(begun / "text.txt", epsilon=0.5)
    assert certificate.bos is False
    certificate.save(tmp_path / "certificate.json")
    with pytest.raises(CertificateError, match="bos: expected no, with which"):
        offramp.load(begun, exits=2).generate("7", certificate=tmp_path / "certificate.json")
    assert lm.sweep(begun / "text.txt", certificate=certificate).content["bos"] is False
    with_bos = sweep(open_model(begun), str(begun / "text.txt"), [0.5])
    assert with_bos["bos"] is True


@pytest.mark.parametrize("unfreeze", [False, True])
def test_exits_are_opened_as_they_were_tuned(begun, tmp_path, unfreeze):
    options = {"exits": [2], "tokens": 400, "unfreeze": unfreeze, "seq_len": 64}
    for bos, expected in (("auto", (BOS,)), ("no", ())):
        out = tmp_path / bos
        offramp.tune(str(begun), begun / "text.txt", out=out, bos=bos, **options)
        assert open_model(out).first_tokens == expected
        trained = json.loads((out / "offramp.json").read_text())["trained"]
        assert trained["bos"] is bool(expected)
