"""A stand-in of the hub on loopback, for huggingface_hub, and what the tests of the hub share.

It speaks the part of the hub's HTTP API that creating, committing and downloading need, with large
files by Git LFS (Xet, which has a protocol of its own, is turned off).
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

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
