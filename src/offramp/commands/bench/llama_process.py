"""llama.cpp in a process of its own, so that a crash of its native code is only a failed request.

Imports no PyTorch.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Timer
from typing import Any

from offramp.errors import CheckpointError, ConfigError
from offramp.reading import open_regular

MODULES = ("llama_cpp", "gguf")
"""Modules of the packages of the extra ``bench``."""
PACKAGES = "llama-cpp-python and gguf, which are not both installed; pip install 'offramp[bench]'"
LIMIT_SECONDS = 900.0
"""A process that has not answered a request after so many seconds hangs, and is ended."""
_MAGIC = b"GGUF"
_STEPS = {
    "describe": "when it read the file",
    "quantise": "when it converted the model",
    "load": "when it loaded the model",
    "decode": "when it decoded",
    "losses": "when it computed PPL",
}
_WORKER = Path(__file__).with_name("llama_worker.py")


def installed() -> bool:
    """Whether llama-cpp-python is installed, and gguf, which reads the table of a file."""
    return all(find_spec(name) is not None for name in MODULES)


def check_gguf(path: Path) -> None:
    """Raise a ConfigError without llama-cpp-python, and a CheckpointError if ``path`` is no GGUF.

    Only the first bytes of the file are read.
    """
    if not installed():
        raise ConfigError(f"gguf: expected the packages {PACKAGES}")
    with open_regular(path) as file:
        begins = file.read(len(_MAGIC))
    if begins != _MAGIC:
        raise CheckpointError(f"{path}: expected a GGUF file, got one that begins with {begins!r}")


class LlamaError(Exception):
    """A request that llama.cpp could not answer, in one line."""


class LlamaCrashError(LlamaError):
    """The process of llama.cpp ended or hung, or llama.cpp cannot be imported."""


class LlamaProcess:
    """A process that answers requests with llama.cpp; ``llama_worker.Server`` has them.

    It ends with this process, and is not stopped by Ctrl-C, which this process handles.
    """

    def __init__(self) -> None:
        paths = [path or str(Path.cwd()) for path in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )

    def request(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Return the answer to a request.

        Raises LlamaError if it fails, the process ends, or ``LIMIT_SECONDS`` pass; then it ends.
        """
        late: list[bool] = []

        def end() -> None:
            late.append(True)
            self._process.kill()

        timer = Timer(LIMIT_SECONDS, end)
        timer.daemon = True
        timer.start()
        try:
            answer = self._answer(json.dumps({"do": do, **arguments}).encode() + b"\n")
        finally:
            timer.cancel()
        if not answer.endswith(b"\n"):
            if late:
                limit = f"{LIMIT_SECONDS / 60:g} minutes"
                raise LlamaCrashError(f"llama.cpp gave no answer within {limit} {_STEPS[do]}")
            raise LlamaCrashError(f"llama.cpp {_ended(self._process.wait())} {_STEPS[do]}")
        content: dict[str, Any] = json.loads(answer)
        if "error" in content:
            kind = LlamaError if content["imported"] else LlamaCrashError
            raise kind(content["error"])
        return content

    def _answer(self, request: bytes) -> bytes:
        """Return the line that answers a request; less than a line if the process ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except BrokenPipeError:
            return b""

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # of a request that it did not read
                pipe.close()


def _ended(code: int) -> str:
    """How a process ended, by its exit code."""
    if code >= 0:
        return f"ended with code {code}"
    return f"crashed ({(signal.strsignal(-code) or f'signal {-code}').lower()})"
