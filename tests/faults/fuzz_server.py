"""Requests of schemathesis against ``offramp serve``, with all its checks: ``make fuzz-server``.

A tiny model with a chat template is trained and served. Requests are made from the server's own
OpenAPI document for so many seconds. The exit code is not 0 if one of them gets an answer that the
document does not allow, such as a 500, or if the server then is not healthy or does not stop.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.request import urlopen

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}. {% endfor %}"
LONGEST = "8192"
"""Largest number of tokens, so that no conversation is too long: a schema cannot say how long all
its messages together may be."""
LIMITS = ("--max-new-tokens", "4", "--capacity", LONGEST, "--slots", "4", "--threads", "1")
GRACE = 60.0


def offramp(*arguments: str | Path) -> list[str]:
    """Return the command line of a command of offramp."""
    return [sys.executable, "-m", "offramp", *map(str, arguments)]


def make_model(folder: Path) -> Path:
    """Train a model of a few thousand parameters, and give it a chat template."""
    model = folder / "model"
    shape = ("--layers", "3", "--dim", "16", "--heads", "2", "--exits", "1,2", "--seq-len", "32")
    shape += ("--max-length", LONGEST)
    subprocess.run(
        offramp("train", "--corpus", "pangram", *shape, "--steps", "10", "--out", model),
        check=True,
        capture_output=True,
    )
    about = {"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(about))
    return model


def fuzz(url: str, seconds: float, folder: Path) -> int:
    """Run schemathesis, which keeps its notes in a folder; return its exit code."""
    command = Path(sys.executable).with_name("schemathesis")
    # one worker: Python 3.11 cannot read source text in two threads that recurse deeply
    options = ("--max-time", f"{seconds:g}", "--workers", "1")
    done = subprocess.run([command, "run", f"{url}/openapi.json", *options], cwd=folder)
    return done.returncode


def main() -> int:
    """Train, serve, and send requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name:
        model, log = make_model(Path(name)), Path(name) / "stderr.txt"
        environment = {key: value for key, value in os.environ.items() if key != "OFFRAMP_API_KEY"}
        with (
            log.open("w") as errors,
            subprocess.Popen(
                offramp("serve", model, "--port", "0", *LIMITS),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            ) as server,
        ):
            try:
                assert server.stdout is not None
                url = server.stdout.readline().strip().rpartition(" at ")[2]
                if not url:
                    raise SystemExit(f"the server did not start: {log.read_text()}")
                found = fuzz(url, seconds, Path(name))
                with urlopen(f"{url}/healthz", timeout=GRACE) as answer:
                    health = json.load(answer)
                server.send_signal(signal.SIGTERM)
                ended = server.wait(GRACE)
            finally:
                server.kill()
        said = log.read_text()
    print(f"The server at the end: {health}; exit code {ended}; on standard error: {said!r:.2000}")
    return found or int(ended != 0 or health["status"] != "ok" or "Traceback" in said)


if __name__ == "__main__":
    sys.exit(main())
