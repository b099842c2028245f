"""A page that a test drives, what it asked for, and canned answers to it."""

import json
import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route

import offramp

FILES = Path(offramp.__file__).parent / "serving" / "page"
ORIGIN = "http://offramp.test"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
NAMES = ("chromium", "chromium-browser", "google-chrome")
MODEL = {
    "num_layers": 6,
    "exit_layers": [2, 4, 6],
    "exits_trained": True,
    "confidences": ["max_prob", "margin", "entropy", "saturation", "patience", "gain"],
    "default_confidence": "gain",
    "flops_pct": {"2": 40.0, "4": 70.0, "6": 100.0},
    "max_tokens": 512,
    "chat": True,
    "certificate": None,
}


def find_chromium() -> str:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found and Path(found).exists():
        return found
    reason = "no chromium: install it or name it in $CHROMIUM"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def token(text: str, layer: int, confidence: float = 0.5) -> dict:
    return {"id": 1, "text": text, "exit_layer": layer, "confidence": confidence}


def stream(*chunks: list[dict], done: bool = True, **end: object) -> str:
    """The events of a text: its tokens in chunks, then its end."""
    about: list[dict] = [{"offramp": {"tokens": tokens}} for tokens in chunks]
    if done:
        figures = {"tokens": [], "mean_layers": 3.5, "flops_pct": 61.0, "tokens_per_s": 44.0, **end}
        about.append({"offramp": figures, "finish": "stop"})
    lines = [
        {
            "choices": [{"index": 0, "text": "", "finish_reason": each.get("finish")}],
            "offramp": each["offramp"],
        }
        for each in about
    ]
    text = "".join(f"data: {json.dumps(line)}\n\n" for line in lines)
    return text + ("data: [DONE]\n\n" if done else "")


class Seen:
    """A page, what it asked for, and what it complained of."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.asked: list[tuple[str, dict | None]] = []
        self.complaints: list[str] = []
        page.on("request", self.note_request)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self.note)

    def note_request(self, request) -> None:
        self.asked.append((request.url, request.post_data_json if request.post_data else None))

    def note(self, message) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    @property
    def bodies(self) -> list[dict]:
        return [body for _, body in self.asked if body is not None]

    def run(self, prompt: str = "The ") -> None:
        self.page.get_by_label("Prompt", exact=True).fill(prompt)
        self.page.get_by_role("button", name="Run").click()

    def tokens(self, method: str = "exit"):
        return self.page.locator(f"[data-method={method}] .text .token")

    def figure(self, name: str, method: str = "exit"):
        return self.page.locator(f"[data-method={method}] [data-figure={name}]")


class Canned:
    """Answers to a page's requests, each made of a status and a body."""

    def __init__(self) -> None:
        self.model: dict = dict(MODEL)
        self.models: tuple[int, str] | None = None
        self.answer: tuple[int, str] | None = (200, stream([token("fox", 2)]))
        self.needs: str | None = None

    def __call__(self, route: Route) -> None:
        path = route.request.url.removeprefix(ORIGIN)
        if path == "/" or path.startswith("/page/"):
            file = FILES / (path.removeprefix("/page/") if path != "/" else "index.html")
            headers = {"Content-Security-Policy": "default-src 'self'"}
            headers["Content-Type"] = TYPES[file.suffix]
            route.fulfill(status=200, headers=headers, body=file.read_text(encoding="utf-8"))
            return
        listed = {"data": [{"id": "tiny", "object": "model", "offramp": self.model}]}
        answer = (200, json.dumps(listed)) if path == "/v1/models" else self.answer
        if self.needs and route.request.headers.get("authorization") != f"Bearer {self.needs}":
            answer = (401, json.dumps({"error": {"message": "api key: expected another"}}))
        if answer is None:
            route.abort("connectionreset")
            return
        route.fulfill(
            status=answer[0], headers={"Content-Type": "text/event-stream"}, body=answer[1]
        )


def in_order(seen: Seen) -> None:
    assert seen.complaints == []
    assert {url.split("/")[2] for url, _ in seen.asked} == {"offramp.test"}
