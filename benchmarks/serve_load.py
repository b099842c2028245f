"""Load ``offramp serve`` with many clients, and check every answer.

    python benchmarks/serve_load.py --model smollm2-135m --clients 64 --seconds 60

The server is a process of its own on this machine. Each client has its own prompt, seed and
options, and sends its request again and again, as a stream, until the time is over; a request that
has begun by then may finish. Beside the clients, ``--slow`` others ask for a stream and never read
it. Every answer of a client must be its first one, and those of the first ``--check`` clients must
be what ``generate`` gives in this process, token for token: an answer that is not is mixed up.

It prints the requests done, errors by kind, times to the first token, tokens/s, and the memory of
the server before, during and after.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

WORDS = ("small", "river", "bridge", "where", "many", "people", "wait", "for", "the", "train")
LONGEST_WAIT = 600.0  # seconds, against a server that hangs


@dataclass(kw_only=True)
class Found:
    """What all clients saw."""

    done: int = 0
    tokens: int = 0
    first_token: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    answers: dict[int, list[int]] = field(default_factory=dict)
    "By client: the token ids of its answer."
    mixed_up: int = 0
    memory: list[float] = field(default_factory=list)
    "MiB of the server, once a second."

    def keep(self, client: int, ids: list[int], first: float) -> None:
        """Note an answer, and compare it with the client's first."""
        self.done += 1
        self.tokens += len(ids)
        self.first_token.append(first)
        self.mixed_up += self.answers.setdefault(client, ids) != ids


def body_of(client: int, *, tokens: int, thresholds: Sequence[float]) -> dict[str, Any]:
    """Return the request of a client: its words are its own, every second one draws its tokens."""
    words = random.Random(client).choices(WORDS, k=6 + client % 20)
    body: dict[str, Any] = {"prompt": f"{client} " + " ".join(words), "max_tokens": tokens}
    if client % 2:
        body |= {"temperature": 0.9, "top_p": 0.95, "seed": client}
    if thresholds and client % 4 < 2:
        body["threshold"] = thresholds[client % len(thresholds)]
    return body | {"stream": True}


async def post(port: int, body: dict[str, Any]) -> tuple[asyncio.StreamReader, Any, int]:
    """Send a request; return where its answer comes, the connection, and the status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
    status = int((await reader.readline()).split()[1])
    while (await reader.readline()).strip():
        pass
    return reader, writer, status


async def events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of a stream. Raises ValueError if it ends before its end."""
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data: "):
            yield json.loads(line[6:])
    raise ValueError("the stream was cut")


async def ask(port: int, client: int, body: dict[str, Any], found: Found) -> None:
    """Send one request and note its answer, or its error."""
    began, first, ids = time.perf_counter(), None, []
    writer = None
    try:
        async with asyncio.timeout(LONGEST_WAIT):
            reader, writer, status = await post(port, body)
            if status != 200:
                found.errors[str(status)] += 1
                await asyncio.sleep(0.2)
                return
            async for chunk in events(reader):
                if "error" in chunk:
                    raise ValueError(chunk["error"]["message"])
                ids += [token["id"] for token in chunk["offramp"]["tokens"]]
                if ids and first is None:
                    first = time.perf_counter() - began
    except (OSError, ValueError, IndexError, TimeoutError) as error:
        found.errors[f"{type(error).__name__}: {error}"[:80]] += 1
    else:
        found.keep(client, ids, first or 0.0)
    finally:
        if writer is not None:
            writer.close()


async def client(port: int, number: int, body: dict[str, Any], until: float, found: Found) -> None:
    """Send a client's request again and again until a moment."""
    while time.perf_counter() < until:
        await ask(port, number, body, found)


async def slow_client(port: int, body: dict[str, Any], until: float) -> None:
    """Ask for a stream and do not read it."""
    while (left := until - time.perf_counter()) > 0:
        try:
            _, writer, _ = await post(port, body)
        except (OSError, IndexError):
            await asyncio.sleep(0.2)
            continue
        writer.transport.pause_reading()
        await asyncio.sleep(min(left, 10.0))
        writer.transport.abort()


async def watch(process: int, found: Found) -> None:
    """Note the memory of the server once a second."""
    server = psutil.Process(process)
    while True:
        found.memory.append(server.memory_info().rss / 2**20)
        await asyncio.sleep(1.0)


async def load(
    port: int, bodies: Sequence[dict[str, Any]], *, seconds: float, slow: int, process: int
) -> Found:
    """Let all clients run for some seconds; return what they saw."""
    found = Found()
    until = time.perf_counter() + seconds
    watching = asyncio.create_task(watch(process, found))
    await asyncio.gather(
        *(client(port, number, body, until, found) for number, body in enumerate(bodies)),
        *(slow_client(port, bodies[0], until) for _ in range(slow)),
    )
    watching.cancel()
    return found


class Server:
    """``offramp serve`` as a process; ``port`` is where it listens."""

    def __init__(self, model: str, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "offramp", "serve", model, "--port", "0", *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.search(r":(\d+)\s*$", line)
        if match is None:
            raise SystemExit(f"the server did not start: {line}")
        self.port = int(match[1])

    def memory(self) -> float:
        """Return the memory of the process in MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def stop(self) -> int:
        """Send SIGTERM; return the exit code."""
        self.process.terminate()
        return self.ended(60)

    def ended(self, seconds: float) -> int:
        """Wait until the process has ended; return its exit code."""
        code = self.process.wait(timeout=seconds)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


def wrong_answers(model: str, bodies: Sequence[dict[str, Any]], found: Found) -> int:
    """Return how many of these clients' answers are not those of ``generate`` in this process."""
    import offramp

    lm = offramp.load(model)
    wrong = 0
    for number, body in enumerate(bodies):
        names = {"max_tokens": "max_new_tokens"}
        options = {names.get(key, key): value for key, value in body.items()}
        prompt = options.pop("prompt")
        del options["stream"]
        ids = [token.id for token in lm.generate(prompt, **options)]
        wrong += found.answers.get(number, ids) != ids
    return wrong


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a request")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--waiting", type=int, default=64)
    parser.add_argument("--slow", type=int, default=1, help="clients that never read")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--threshold", type=float, action="append", default=[])
    parser.add_argument("--check", type=int, default=4, help="clients compared with generate")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    options = ["--slots", str(given.slots), "--waiting", str(given.waiting)]
    if given.threads is not None:
        options += ["--threads", str(given.threads)]
    bodies = [
        body_of(number, tokens=given.tokens, thresholds=given.threshold)
        for number in range(given.clients)
    ]
    server = Server(given.model, *options)
    try:
        before = server.memory()
        began = time.perf_counter()
        process = server.process.pid
        found = asyncio.run(
            load(server.port, bodies, seconds=given.seconds, slow=given.slow, process=process)
        )
        seconds = time.perf_counter() - began
        after = server.memory()
    finally:
        code = server.stop()
    half = found.memory[len(found.memory) // 2 :] or [after]
    result = {
        "clients": given.clients,
        "slow_clients": given.slow,
        "seconds": seconds,
        "requests": found.done,
        "errors": dict(found.errors),
        "mixed_up": found.mixed_up,
        "wrong": wrong_answers(given.model, bodies[: given.check], found),
        "checked": given.check,
        "p50_first_token_s": percentile(found.first_token, 0.5),
        "p99_first_token_s": percentile(found.first_token, 0.99),
        "tokens_per_s": found.tokens / seconds,
        "memory_mib": {
            "before": before,
            "largest": max(found.memory, default=after),
            "second_half": [min(half), max(half)],
            "after": after,
        },
        "exit_code": code,
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
