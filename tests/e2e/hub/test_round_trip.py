"""What was pushed to the hub is loaded from it with the same bits."""

import json
import shutil

import pytest
import torch
from hub_stand_in import TOKEN, logits, push, refused, same

import offramp as library
from offramp.models.huggingface.adapter import adapter_hashes
from offramp.models.huggingface.exits_file import write_exits
from offramp.models.sources import Source


@pytest.mark.parametrize("folder", ["trained", "unfrozen", "quantised"])
def test_a_whole_model_comes_back_with_the_same_bits(offramp, hub, folder, request):
    model = request.getfixturevalue(folder)
    result = push(offramp, model, "me/whole")
    assert f"{hub.endpoint}/me/whole  Next: offramp generate me/whole PROMPT\n" in result.stdout
    assert len(hub.repositories["me/whole"].messages) == 2  # the first one, and one commit
    same(library.load("me/whole"), library.load(model))
    assert offramp("generate", "me/whole", "The", "--max-new-tokens", 2).returncode == 0


def test_exits_go_without_their_backbone_which_is_found_by_name_commit_and_hash(
    offramp, hub, checkpoint, frozen
):
    commit = hub.put("meta/base", checkpoint)
    push(offramp, frozen, "me/exits", "--base", "meta/base")
    files = hub.files("me/exits")
    assert {".gitattributes", "README.md", "exits.safetensors", "offramp.json"} <= set(files)
    assert not {"model.safetensors", "config.json"} & set(files)
    base = json.loads(files["offramp.json"])["base"]
    assert (base["id"], base["revision"]) == ("meta/base", commit)
    assert "folder" not in base
    same(library.load("me/exits"), library.load(frozen))
    changed = {**hub.files("meta/base"), "model.safetensors": b"others"}
    hub.repositories["meta/base"].commit("main", changed, "other weights")
    same(library.load("me/exits"), library.load(frozen))  # still at the commit
    card = files["README.md"].decode()
    assert "base_model: meta/base" in card
    assert "base_model_relation: adapter" in card
    assert commit in card


def test_python_pushes_what_save_would_write(hub, checkpoint, frozen):
    hub.put("meta/base", checkpoint)
    lm = library.load(frozen, base="meta/base")
    pushed = lm.push_to_hub("gates", private=True, token=TOKEN)
    assert pushed.repository == "me/gates"
    assert pushed.files == ("README.md", "exits.safetensors", "fitted.safetensors", "offramp.json")
    assert hub.repositories["me/gates"].private
    assert pushed.commit == hub.repositories["me/gates"].branches["main"]
    again = library.load("me/gates")
    same(again, library.load(frozen))
    assert again.generate("7 ", threshold=0.5, max_new_tokens=4).rule.confidence == "gain"
    plain = library.load("meta/base", exits=[1, 3])
    plain.push_to_hub("me/shared", commit_message="Shared exits")
    assert hub.repositories["me/shared"].messages[-1] == "Shared exits"
    assert "model.safetensors" not in hub.files("me/shared")
    same(library.load("me/shared"), plain)


def test_a_model_of_transformers_in_memory_is_pushed_whole(hub, checkpoint):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = library.load(checkpoint).tokenizer
    lm = library.load(model, tokenizer=tokenizer, exits=[2])
    lm.push_to_hub("me/memory")
    assert "model.safetensors" in hub.files("me/memory")
    again = library.load("me/memory")
    assert again.exit_layers == (2, 4)
    torch.testing.assert_close(logits(again), logits(lm))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft's calls of transformers
def test_exits_and_an_adapter_go_without_their_backbone(offramp, hub, checkpoint, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    commit = hub.put("meta/base", checkpoint)
    backbone = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = tmp_path / "private-place"
    peft.get_peft_model(backbone, config).save_pretrained(model)
    assert "[More Information Needed]" in (model / "README.md").read_text()  # a form of peft
    exits = library.from_pretrained(checkpoint, exit_layers=[2], exit_head="norm")
    write_exits(
        model,
        exits.exits,
        source=Source(id="meta/base", folder=checkpoint, revision=commit),
        exit_layers=exits.exit_layers,
        exit_head=exits.exit_head,
        model_type="llama",
        dtype=exits.dtype,
        trained=None,
        policy=None,
        adapter=adapter_hashes(model),
    )
    shutil.copy(checkpoint / "tokenizer.json", model)
    push(offramp, model, "me/lora")
    files = hub.files("me/lora")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert "model.safetensors" not in files
    assert not any(b"private-place" in data or b"pytest" in data for data in files.values())
    assert "a LoRA adapter of their backbone" in files["README.md"].decode()
    same(library.load("me/lora"), library.load(model))


def test_a_branch_is_made_and_loaded_by_its_name_or_its_commit(offramp, hub, trained):
    push(offramp, trained, "me/model")
    hub.repositories["me/model"].commit("main", {"notes.txt": b"x"}, "removed all")
    pushed = library.load(trained).push_to_hub("me/model@v2/small")
    assert pushed.repository == "me/model@v2/small"
    expected = library.load(trained)
    same(library.load("me/model@v2/small"), expected)
    same(library.load(f"me/model@{pushed.commit}"), expected)
    refused(offramp("generate", "me/model@v3", "The"), "v3", "expected a branch, a tag or a commit")
    refused(offramp("generate", "me/model", "The"), "expected config.json or offramp.json")
    refused(offramp("push", trained, f"me/model@{pushed.commit}"), "expected a branch after @")
    assert "me/model@v2/small" in hub.files("me/model", "v2/small")["README.md"].decode()
