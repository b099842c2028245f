"""Push to the hub and load from it: huggingface_hub talks to a stand-in of the hub on loopback.

The stand-in speaks the part of the hub's HTTP API that creating, committing and downloading need,
with large files by Git LFS (Xet, which has a protocol of its own, is turned off).
"""

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

import offramp as library
from offramp.errors import CertificateError, CheckpointError, ConfigError
from offramp.models.huggingface.adapter import adapter_hashes
from offramp.models.huggingface.exits_file import write_exits
from offramp.models.sources import Source

TOKEN = "hf_good"
LFS = (".safetensors",)


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    "The commit of each branch."
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    "The files of each commit."
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        number = f"{len(self.commits)} {sorted(files)} {message}"
        commit = hashlib.sha1(number.encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        self.messages.append(message)
        return commit

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass
class Hub:
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    fail: dict[str, int] = field(default_factory=dict)
    "Statuses to answer with, by a part of the path; 0 closes the connection."
    endpoint: str = ""

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        found = self.repositories[name].at(branch)
        assert found is not None
        return found[1]

    def put(self, name: str, folder: Path) -> str:
        """Put a folder on the hub as somebody else did."""
        repository = self.repositories.setdefault(name, Repository())
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return repository.commit("main", files, "by somebody else")


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, content: object, status: int = 200, **headers: object) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def missing(self, code: str, status: int = 404) -> None:
            self.answer({"error": code}, status, X_Error_Code=code)

        def serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            path = urlsplit(self.path).path
            hub.calls.append(f"{self.command} {path}")
            for part, status in hub.fail.items():
                if part in f"{self.command} {path}":
                    if status == 0:
                        self.close_connection = True
                        self.connection.close()
                        return
                    self.answer({"error": f"no: {status}"}, status)
                    return
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            writes = self.command in ("POST", "PUT") and path != "/api/validate-yaml"
            if (writes and token != TOKEN) and not path.startswith("/upload/"):
                self.answer({"error": "Invalid username or password."}, 401)
                return
            self.route(path, body, allowed=token == TOKEN)

        def route(self, path: str, body: bytes, *, allowed: bool) -> None:
            if path == "/":
                self.answer(b"")
            elif path == "/api/validate-yaml":
                self.answer({"warnings": [{"message": "advice"}]})
            elif path == "/api/repos/create":
                self.create(json.loads(body))
            elif path.startswith("/upload/"):
                oid = path.removeprefix("/upload/")
                assert hashlib.sha256(body).hexdigest() == oid
                hub.objects[oid] = body
                self.answer(b"")
            elif found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
                objects = [
                    {
                        **each,
                        "actions": {"upload": {"href": f"{hub.endpoint}/upload/{each['oid']}"}},
                    }
                    for each in json.loads(body)["objects"]
                ]
                self.answer({"objects": objects, "transfer": "basic"})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.+))?", path):
                self.model(found[1], found[2] or "", body, allowed=allowed)
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.resolve(*found.groups())
            else:
                self.missing("EntryNotFound")

        def create(self, wanted: dict[str, str]) -> None:
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if name.startswith("nobody/"):
                self.answer({"error": "no such owner"}, 404)
                return
            address = {"url": f"{hub.endpoint}/{name}", "name": name}
            if name in hub.repositories:
                self.answer({**address, "error": "You already created this model repo"}, 409)
                return
            made = hub.repositories[name] = Repository(wanted.get("visibility") == "private")
            made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self.answer(address)

        def model(self, name: str, rest: str, body: bytes, *, allowed: bool) -> None:
            repository = hub.repositories.get(name)
            if repository is None or (repository.private and not allowed):
                self.missing("RepoNotFound", 401 if not allowed else 404)
                return
            what, _, quoted = rest.partition("/")
            revision = unquote(quoted)
            if what == "branch":
                exists = revision in repository.branches
                if not exists:
                    repository.branches[revision] = repository.branches["main"]
                self.answer({"error": "exists"} if exists else {}, 409 if exists else 200)
                return
            found = repository.at(revision or "main")
            if found is None:
                self.missing("RevisionNotFound")
                return
            commit, files = found
            if what in ("", "revision"):
                siblings = [{"rfilename": each} for each in files]
                about = {"id": name, "sha": commit, "private": repository.private}
                self.answer({**about, "siblings": siblings, "tags": [], "downloads": 0})
            elif what == "tree":
                self.answer([entry(each, data) for each, data in files.items()])
            elif what == "preupload":
                self.answer({"files": [mode(each) for each in json.loads(body)["files"]]})
            elif what == "commit":
                made = self.commit(repository, revision, dict(files), body)
                address = f"{hub.endpoint}/{name}/commit/{made}"
                self.answer({"success": True, "commitOid": made, "commitUrl": address})
            else:
                self.missing("EntryNotFound")

        def commit(
            self, repository: Repository, branch: str, files: dict[str, bytes], body: bytes
        ) -> str:
            message = ""
            for line in body.splitlines():
                part = json.loads(line)
                value = part["value"]
                if part["key"] == "header":
                    message = value["summary"]
                elif part["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif part["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
                elif part["key"] == "deletedFile":
                    del files[value["path"]]
            return repository.commit(branch, files, message)

        def resolve(self, name: str, revision: str, file: str) -> None:
            found = hub.repositories[name].at(unquote(revision))
            if found is None or file not in found[1]:
                self.missing("EntryNotFound")
                return
            data = found[1][file]
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self.answer(data, ETag=etag, X_Repo_Commit=found[0])

        do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815

    return Handler


def entry(name: str, data: bytes) -> dict[str, object]:
    found: dict[str, object] = {"type": "file", "path": name, "size": len(data)}
    found["oid"] = hashlib.sha1(data).hexdigest()
    if name.endswith(LFS):
        oid = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
    return found


def mode(file: dict[str, str]) -> dict[str, object]:
    kind = "lfs" if file["path"].endswith(LFS) else "regular"
    return {"path": file["path"], "uploadMode": kind, "shouldIgnore": False}


@pytest.fixture(scope="module")
def server():
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(hub)) as listening:
        listening.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield hub
        listening.shutdown()


@pytest.fixture
def hub(server, tmp_path, monkeypatch) -> Hub:
    """The stand-in, empty, with a token that may write and an empty cache."""
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for part in (server.repositories, server.objects, server.calls, server.fail):
        part.clear()
    return server


@pytest.fixture(scope="session")
def text(checkpoint) -> Path:
    return checkpoint / "text.txt"


@pytest.fixture(scope="session")
def frozen(offramp, checkpoint, text, tmp_path_factory) -> Path:
    """Exits on a frozen backbone, whose folder offramp.json names."""
    out = tmp_path_factory.mktemp("private-place") / "tuned"
    flags = ("--exits", "1,2", "--exit-head", "norm", "--epochs", 1, "--tokens", 400)
    result = offramp("tune", checkpoint, "--corpus", text, *flags, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def unfrozen(offramp, checkpoint, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("private-place") / "unfrozen"
    flags = ("--exits", "2", "--unfreeze", "--epochs", 1, "--seq-len", 32, "--tokens", 400)
    result = offramp("tune", checkpoint, "--corpus", text, *flags, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def quantised(offramp, frozen, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("private-place") / "int8"
    result = offramp("quantise", frozen, "--weights", "int8", "--out", out)
    assert result.returncode == 0, result.stderr
    return out


def push(offramp, model, name, *flags):
    result = offramp("push", model, name, *flags)
    assert result.returncode == 0, result.stderr
    return result


def refused(result, *parts):
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("offramp: ")
    for part in parts:
        assert part in sentence, sentence


def logits(lm):
    lm.model.silence_untrained()
    with torch.no_grad():
        return lm.model(torch.arange(1, 12)[None])


def same(one, other):
    assert one.sha256 == other.sha256
    assert one.exit_layers == other.exit_layers
    assert torch.equal(logits(one), logits(other))
    prompt = "7 quick brown"
    again, first = (
        lm.generate(prompt, threshold=0.3, max_new_tokens=8, confidence="max_prob").text
        for lm in (one, other)
    )
    assert again == first


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


def test_nothing_but_the_models_own_files_is_uploaded(offramp, hub, trained, tmp_path):
    model = shutil.copytree(trained, tmp_path / "model")
    for name in (".env", "notes.txt", "secret.safetensors", "optimizer.json", ".git-credentials"):
        (model / name).write_text("secret")
    (model / "logs").mkdir(exist_ok=True)
    (model / "logs" / "events").write_text("secret")
    push(offramp, model, "me/clean")
    expected = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert set(hub.files("me/clean")) - {".gitattributes", "fitted.safetensors"} == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "README.md"])
def test_a_link_out_of_the_folder_is_refused(offramp, hub, trained, tmp_path, name):
    model = shutil.copytree(trained, tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    (tmp_path / "elsewhere").write_bytes(
        (trained / name).read_bytes() if name != "README.md" else b"x"
    )
    (model / name).symlink_to(tmp_path / "elsewhere")
    refused(offramp("push", model, "me/links"), name, "got a link to")
    assert hub.repositories == {}


def test_no_name_of_this_machine_is_uploaded(offramp, hub, checkpoint, frozen, unfrozen, tmp_path):
    hub.put("meta/base", checkpoint)
    corpus = tmp_path / "secret-project" / "text.txt"
    corpus.parent.mkdir()
    shutil.copy(checkpoint / "text.txt", corpus)
    tokenizer = tmp_path / "secret-project" / "tokenizer.json"
    shutil.copy(checkpoint / "tokenizer.json", tokenizer)
    native, swept = tmp_path / "native", tmp_path / "sweep.json"
    train = ("--layers", 2, "--dim", 16, "--heads", 2, "--exits", 1, "--steps", 2, "--seq-len", 16)
    made = offramp(
        *("train", "--corpus", corpus, "--tokenizer", tokenizer, *train, "--batch-size", 2),
        *("--tracker", "none", "--out", native),
    )
    assert made.returncode == 0, made.stderr
    assert offramp("sweep", native, "--corpus", corpus, "--out", swept).returncode == 0
    push(offramp, native, "me/native", "--sweep", swept)
    push(offramp, frozen, "me/frozen", "--base", "meta/base")
    push(offramp, unfrozen, "me/unfrozen")
    for name in ("me/native", "me/frozen", "me/unfrozen"):
        for file, data in hub.files(name).items():
            for secret in (
                "secret-project",
                "private-place",
                str(tmp_path),
                str(Path.home()) + "/",
            ):
                assert secret.encode() not in data, (name, file, secret)
    assert json.loads(hub.files("me/native")["config.json"])["corpus"]["name"] == "text.txt"
    assert "text.txt" in hub.files("me/native")["README.md"].decode()


def test_exits_of_a_backbone_on_this_machine_only_are_refused(offramp, hub, frozen):
    refused(
        offramp("push", frozen, "me/exits"), "whose backbone is on the hub", "--base OWNER/NAME"
    )
    assert hub.repositories == {}
    with pytest.raises(CheckpointError, match="whose backbone is on the hub"):
        library.load(frozen).push_to_hub("me/exits")


def test_a_backbone_with_other_weights_is_refused(
    offramp, hub, frozen, trained, checkpoint, tmp_path
):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    data = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(data[:-4] + b"\0\0\0\1")
    hub.put("meta/other", other)
    refused(offramp("push", frozen, "me/exits", "--base", "meta/other"), "its sha256 is now")
    refused(offramp("push", trained, "me/exits", "--base", "meta/other"), "base: expected none")


def test_a_plain_checkpoint_is_refused(offramp, hub, checkpoint):
    refused(offramp("push", checkpoint, "me/plain"), "got a checkpoint without exits")


def test_exits_from_the_hub_may_not_name_a_folder_of_this_machine(offramp, hub, frozen, checkpoint):
    hub.put("eve/exits", frozen)  # as it is, with the place of its backbone
    refused(offramp("generate", "eve/exits", "7"), "expected the name of a model on the hub")
    hub.put("meta/base", checkpoint)
    same(library.load("eve/exits", base="meta/base"), library.load(frozen))


def test_gates_cannot_be_fitted_into_the_cache_of_the_hub(offramp, hub, trained, text):
    push(offramp, trained, "me/model")
    fit = offramp("confidence", "me/model", "--corpus", "pangram", "--fit", "pangram")
    refused(fit, "expected the folder of a model, to keep its gates in")


def test_a_card_that_was_written_by_hand_stays(offramp, hub, trained, tmp_path):
    model = shutil.copytree(trained, tmp_path / "model")
    (model / "README.md").write_text("# Mine\n")
    push(offramp, model, "me/mine")
    assert hub.files("me/mine")["README.md"] == b"# Mine\n"
    refused(offramp("push", model, "me/mine", "--license", "mit"), "license: expected none")
    (model / "README.md").unlink()
    kept = push(offramp, model, "me/mine")  # the one on the hub
    assert "was written by hand and stays" in kept.stderr
    assert hub.files("me/mine")["README.md"] == b"# Mine\n"
    push(offramp, model, "me/mine", "--replace-card", "--license", "apache-2.0")
    card = hub.files("me/mine")["README.md"].decode()
    assert "license: apache-2.0" in card
    push(offramp, model, "me/mine", "--license", "mit")  # a generated one is written anew
    assert "license: mit" in hub.files("me/mine")["README.md"].decode()
    (model / "README.md").write_text(card + "\nAnd a line by hand.\n")
    push(offramp, model, "me/mine")
    assert hub.files("me/mine")["README.md"].decode().endswith("by hand.\n")


def test_an_earlier_model_leaves_nothing_that_would_be_read(
    offramp, hub, checkpoint, frozen, trained
):
    hub.put("meta/base", checkpoint)
    push(offramp, frozen, "me/model", "--base", "meta/base")
    repository = hub.repositories["me/model"]
    repository.commit("main", {**hub.files("me/model"), "mine.txt": b"kept"}, "a file")
    push(offramp, trained, "me/model")
    assert not {"offramp.json", "exits.safetensors"} & set(hub.files("me/model"))
    assert "mine.txt" in hub.files("me/model")
    same(library.load("me/model"), library.load(trained))


def test_a_certificate_and_a_frontier_are_in_the_card(offramp, hub, trained, tmp_path):
    certificate, swept = tmp_path / "certificate.json", tmp_path / "sweep.json"
    (text := tmp_path / "few.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    flags = ("--corpus", text, "--epsilon", 0.5, "--out")
    assert offramp("calibrate", trained, *flags, certificate).returncode == 0
    corpus = ("--corpus", text, "--out")
    assert offramp("sweep", trained, *corpus, swept, "--thresholds", "0.5,0.75").returncode == 0
    push(offramp, trained, "me/model", "--certificate", certificate, "--sweep", swept)
    card = hub.files("me/model")["README.md"].decode()
    for part in ("## Certificate", "With probability 0.95 or more", "## Frontier", "| 0.75 |"):
        assert part in card
    stored = tmp_path / "from-hub.json"
    stored.write_bytes(hub.files("me/model")["certificate.json"])
    used = offramp("generate", "me/model", "The", "--certificate", stored, "--max-new-tokens", 3)
    assert used.returncode == 0, used.stderr
    lm = library.load("me/model")
    lm.push_to_hub("me/again", certificate=stored, sweep=lm.sweep(text, [0.5]))
    assert "## Frontier" in hub.files("me/again")["README.md"].decode()


def test_figures_of_another_model_are_refused_before_anything_is_uploaded(
    offramp, hub, trained, unfrozen, text, tmp_path
):
    certificate, swept = tmp_path / "certificate.json", tmp_path / "sweep.json"
    assert offramp("calibrate", unfrozen, "--corpus", text, "--out", certificate).returncode == 0
    assert offramp("sweep", unfrozen, "--corpus", text, "--out", swept).returncode == 0
    refused(offramp("push", trained, "me/x", "--certificate", certificate), "certificate: expected")
    refused(offramp("push", trained, "me/x", "--sweep", swept), "sweep: expected the figures of")
    (tmp_path / "hostile.json").write_text('{"num_layers": "many", "rows": 7}')
    refused(offramp("push", trained, "me/x", "--sweep", tmp_path / "hostile.json"), "hostile.json")
    refused(offramp("push", trained, "me/x", "--sweep", tmp_path / "none.json"), "none.json")
    with pytest.raises(CertificateError):
        library.load(trained).push_to_hub("me/x", certificate=certificate)
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("part", "status", "expected"),
    [
        ("POST /api/repos/create", 401, "expected a token with which the hub lets you write"),
        ("/preupload/", 401, "log in with: hf auth login"),
        ("POST /api/repos/create", 403, "expected a token that may write there"),
        ("/commit/", 403, "got one that may not"),
        ("/commit/", 404, "expected an owner and a branch that the hub has"),
        ("/commit/", 412, "somebody else changed it meanwhile"),
        ("/commit/", 500, "refused the upload with status 500"),
        ("/commit/", 413, "refused the upload with status 413"),
        ("/commit/", 0, "the upload broke off"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(offramp, hub, trained, part, status, expected):
    hub.fail[part] = status
    refused(offramp("push", trained, "me/model"), "me/model", expected)
    assert all(len(each.commits) == 1 for each in hub.repositories.values())


def test_an_upload_that_breaks_off_commits_nothing_and_can_be_repeated(
    offramp, hub, trained, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail["PUT /upload/"] = 0
    refused(offramp("push", trained, "me/model"), "the upload broke off", "push it again")
    assert len(hub.repositories["me/model"].commits) == 1
    hub.fail.clear()
    push(offramp, trained, "me/model")
    same(library.load("me/model"), library.load(trained))


def test_ctrl_c_in_an_upload_commits_nothing(offramp, hub, trained, monkeypatch):
    def interrupt(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.preupload_lfs_files", interrupt)
    assert offramp("push", trained, "me/model").returncode == 130
    assert len(hub.repositories["me/model"].commits) == 1


def test_no_token_or_a_wrong_one_is_a_sentence(offramp, hub, trained, monkeypatch):
    with pytest.raises(CheckpointError, match="hf auth login"):
        library.load(trained).push_to_hub("me/model", token="hf_wrong")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    result = offramp("push", trained, "me/model")
    refused(result, "hf auth login")
    assert "hf_wrong" not in result.stderr
    refused(offramp("push", trained, "nobody/model"), "hf auth login")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused(offramp("push", trained, "nobody/model"), "expected an owner and a branch")
    assert hub.repositories == {}


def test_a_private_push_to_a_public_repository_is_refused(offramp, hub, trained):
    push(offramp, trained, "me/public")
    before = dict(hub.repositories["me/public"].branches)
    refused(offramp("push", trained, "me/public", "--private"), "expected a private repository")
    assert hub.repositories["me/public"].branches == before


@pytest.mark.parametrize(
    "name",
    [
        *("a/b/c", "", " ", "me/..", "me/a b", "me/a--b", "me/m.git", "../x", "me/m@", "me/m@../x"),
        *("https://huggingface.co/me/m", "me/\x1b[2J", "é/ü", "me/" + "x" * 5000, "me/m@a@b"),
    ],
)
def test_a_malformed_name_is_a_sentence(offramp, hub, trained, name):
    refused(offramp("push", trained, name), "name: expected OWNER/NAME")
    assert hub.calls == []


@pytest.mark.parametrize("name", [None, 5, b"me/m", Path("me/m")])
def test_a_name_of_another_type_is_a_sentence(trained, name):
    with pytest.raises(ConfigError, match="name: expected OWNER/NAME"):
        library.load(trained).push_to_hub(name)


def test_without_a_network_a_push_is_a_sentence_and_a_load_uses_the_cache(
    offramp, hub, trained, monkeypatch
):
    push(offramp, trained, "me/model")
    expected = library.load("me/model").sha256
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert library.load("me/model").sha256 == expected == library.load(trained).sha256
    refused(offramp("push", trained, "me/model"), "HF_HUB_OFFLINE is set")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(offramp("push", trained, "me/model"), "http://127.0.0.1:9", "it does not answer")
    refused(offramp("generate", "me/other", "x"), "since the Hugging Face hub cannot be reached")


def test_unknown_options_and_empty_words_are_sentences(offramp, hub, trained):
    lm = library.load(trained)
    with pytest.raises(
        ConfigError, match="privat: expected the name of an option, perhaps private"
    ):
        lm.push_to_hub("me/m", privat=True)
    with pytest.raises(ConfigError, match="private"):
        lm.push_to_hub("me/m", private="yes")
    refused(offramp("push", trained, "me/m", "--message", " "), "commit_message: expected text")
    refused(offramp("push", trained, "me/m", "--license", "a\nb"), "license: expected the name")
    refused(offramp("push", "no-such-folder/x/y", "me/m"), "found none")
    assert hub.calls == []


def test_a_newer_format_is_a_sentence_and_an_older_one_loads(
    offramp, hub, frozen, trained, monkeypatch, tmp_path
):
    newer = shutil.copytree(frozen, tmp_path / "newer")
    about = json.loads((newer / "offramp.json").read_text())
    about["base"] |= {"id": about["base"]["folder"]}
    for wrong, words in {
        2: "of a format up to 1, got format 2, which a newer offramp wrote",
        0: "of format 1, got 0",
        True: "of format 1, got True",
        "1": "of format 1, got '1'",
    }.items():
        (newer / "offramp.json").write_text(json.dumps({**about, "format": wrong}))
        refused(offramp("generate", newer, "7"), words)
    (newer / "offramp.json").write_text(json.dumps({**about, "format": 1}))
    monkeypatch.setattr("offramp.models.huggingface.exits_file.FORMAT", 2)
    assert library.load(newer).sha256 == library.load(frozen).sha256
    monkeypatch.setattr("offramp.models.native.checkpoint.FORMAT", 2)
    library.load(trained)


def test_a_token_in_the_environment_is_enough_and_is_never_shown(hub, trained):
    assert os.environ["HF_TOKEN"] == TOKEN
    assert TOKEN not in repr(library.load(trained).push_to_hub("me/model"))
