"""Children that run a command and are killed: a fork of this warm process each.

PyTorch's start costs seconds, a fork costs milliseconds. This process therefore imports everything
once, runs no operation that starts a thread, and does all work in forks of itself.
"""

import builtins
import contextlib
import inspect
import io
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

os.environ["TOKENIZERS_PARALLELISM"] = "false"
KILLS = int(os.environ.get("KILLS", "300"))
"""Kills in all; each command gets its share."""
LIMIT_SECONDS = 120.0
WRITES = ("w", "a", "x", "+")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended."""

    code: int
    "Its exit code; -9 if it was killed."
    text: str
    "What it printed."
    points: list[str]
    "Where it could have been killed: before and in the middle of its file operations."
    seconds: float

    @property
    def sentence(self) -> str:
        """The sentence of an error, or everything if there is a traceback."""
        if "Traceback" in self.text:
            return self.text
        said = [line for line in self.text.splitlines() if line.startswith("offramp: ")]
        return said[-1] if said else self.text[-300:]


@dataclass
class Shim:
    """Counts a process's file operations below a folder, and kills it at one of them.

    There is a point before each operation. Where a file is written there is another one in the
    middle: a file that is opened to be written to is empty, and safetensors are half there.
    """

    folder: str
    kill_at: int | None
    log: int
    "Descriptor of a file that gets a line for each point."
    seen: int = 0
    inside: bool = False

    def install(self) -> None:
        """Watch Python's own operations; those of safetensors are in another language."""
        import safetensors.torch

        sys.addaudithook(self._audit)
        serialize = safetensors.torch.serialize_file

        def watched_serialize(tensors: Any, path: Any, metadata: Any = None) -> None:
            def half() -> None:
                Path(path).with_name(".tmpAbCdEf").write_bytes(bytes(100))

            self._operation("serialize", str(path), half)
            serialize(tensors, path, metadata)

        safetensors.torch.serialize_file = watched_serialize

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = any(sign in mode for sign in WRITES) if mode else flags & 0o3
            if writes and isinstance(path, str | bytes | os.PathLike):
                cut = not mode or "a" not in mode
                self._operation(event, os.fsdecode(path), lambda: self._begin(path, cut))
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._operation(event, os.fsdecode(arguments[1]))
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            path, place = arguments[0], arguments[-1]
            if isinstance(path, int):
                path = opened(path)
            if event in ("os.remove", "os.rmdir") and isinstance(place, int) and place >= 0:
                path = opened(place) / os.fsdecode(path)
            self._operation(event, os.fsdecode(path))

    def _begin(self, path: Any, cut: bool) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if cut else os.O_APPEND)
        descriptor = os.open(path, flags)
        if not cut:
            os.write(descriptor, b"12,0.")

    def _operation(self, kind: str, path: str, half: Callable[[], None] | None = None) -> None:
        if not str(Path(path).absolute()).startswith(self.folder):
            return
        self.inside = True
        self._point(f"before {kind} {path}")
        if half is not None:
            self._point(f"in {kind} {path}", half)
        self.inside = False

    def _point(self, label: str, half: Callable[[], None] = lambda: None) -> None:
        os.write(self.log, f"{label.replace(self.folder, '')}\n".encode())
        if self.seen == self.kill_at:
            with contextlib.suppress(OSError):
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1


def opened(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


class Children:
    """Runs commands in forks of this process, below one folder."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self._printed, self._log = folder / "printed", folder / "points"
        self.killed = 0
        self.reset(None)

    def reset(self, template: Path | None) -> None:
        """Make the folder what it was when the template was stored, or empty."""
        shutil.rmtree(self.root, ignore_errors=True)
        if template is None:
            self.root.mkdir()
        else:
            shutil.copytree(template, self.root, symlinks=True)

    def run(
        self,
        do: Callable[[], object],
        *,
        point: int | None = None,
        after_seconds: float | None = None,
        limit: Callable[[], None] = lambda: None,
    ) -> Ended:
        """Run a function in a child, perhaps killed at a point or after a time."""
        begun = time.monotonic()
        process = os.fork()
        if process == 0:
            self._child(do, point, limit)
        if after_seconds is not None:
            time.sleep(after_seconds)
            os.kill(process, signal.SIGKILL)
        code = self._wait(process, begun)
        self.killed += code == -signal.SIGKILL
        return Ended(
            code=code,
            text=self._printed.read_text(errors="replace"),
            points=self._log.read_text().splitlines(),
            seconds=time.monotonic() - begun,
        )

    def _wait(self, process: int, begun: float) -> int:
        while True:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > begun + LIMIT_SECONDS:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                pytest.fail(f"a child hangs: {self._printed.read_text()[-500:]}")
            time.sleep(0.002)

    def _child(
        self, do: Callable[[], object], point: int | None, limit: Callable[[], None]
    ) -> None:
        code = 1
        try:
            printed = os.open(self._printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            sys.stdout, sys.stderr = (
                io.TextIOWrapper(io.FileIO(number, "w"), write_through=True, encoding="utf-8")
                for number in (1, 2)
            )
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.chdir(self.root)
            os.environ["OFFRAMP_CACHE"] = str(self.root / "cache")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            make_everything_small()
            limit()
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            Shim(folder=str(self.root), kill_at=point, log=log).install()
            do()
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)


def make_everything_small() -> None:
    """In a child: few steps, runs of a study in this process, and plots without a renderer."""
    import vl_convert

    from offramp.calibration.specialise_config import SpecialiseConfig
    from offramp.cli.base import console
    from offramp.exits.gate import GateConfig
    from offramp.studies import runs
    from offramp.studies.reproduce import study as reproduction
    from offramp.studies.study import recipe, timing
    from offramp.studies.study.plan import GateFit, Recipe
    from offramp.studies.study.studies import STUDIES

    console.file = sys.stderr
    for config, defaults in (
        (GateConfig, {"steps": 4, "batch_size": 32}),
        (SpecialiseConfig, {"steps": 3, "batch_size": 32, "tokens": 300}),
        (GateFit, {"steps": 4, "tokens": 200}),
    ):
        create = inspect.unwrap(config.__init__)  # annotations are checked around it
        if create.__kwdefaults__:
            create.__kwdefaults__.update(defaults)
        else:
            names = [each.name for each in fields(config)]
            stored = dict(zip(names, create.__defaults__, strict=True))
            create.__defaults__ = tuple((stored | defaults).values())
    vl_convert.vegalite_to_png = lambda *_, **__: b"\x89PNG"
    runs.ProcessPoolExecutor = InThisProcess
    small = {"seq_len": 16, "batch_size": 4, "warmup_steps": 0}
    recipe.GATES = GateFit()
    recipe.rounds = lambda layers, budget, upper: iter(
        (
            (
                "schedule",
                [{"training": {"loss_weights": f"asymmetric_exits:{a}"}} for a in (0.3, 0.7)],
            ),
            ("exits", [{"exits": (1,)}]),
            ("specialise", [{"specialise": SpecialiseConfig(compute_budget=budget)}]),
        )
    )
    recipe.CHARACTERS = replace(recipe.CHARACTERS, **small)
    reproduction.TRAIN_CHARACTERS, reproduction.VALIDATION_CHARACTERS = 2200, 2100
    reproduction.PANGRAM_EPOCHS = 1
    timing.PASS_BATCHES = timing.ROUNDS = 1
    study = STUDIES["objectives"]
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 32, "exit_layers": (1,)}
    STUDIES["objectives"] = replace(
        study,
        tokenizer="characters",
        model=replace(study.model, **shape),
        training=replace(study.training, **small),
        gates=GateFit(),
        tokens=640,
        test_tokens=100,
        static_layers=(1, 2),
        seeds=2,
        recipes=(Recipe(label="half", training={"loss_weights": "asymmetric:0.5"}),),
    )


class InThisProcess:
    """Stands in for worker processes, so that all file operations are those of one process."""

    def __init__(self, *_: Any, initializer: Any, initargs: Any, **__: Any) -> None:
        from offramp.studies import runs

        runs._stop, runs._reports = initargs[1:]

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., None], *arguments: Any) -> Any:
        """Do the work at once."""
        from concurrent.futures import Future

        future: Future[None] = Future()
        try:
            work(*arguments)
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: Any) -> None:
        """Nothing is left to do."""


@pytest.fixture(scope="session")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    """The children of this process, which imports what they need."""
    import torch

    torch.set_num_threads(1)
    import transformers.models.llama.modeling_llama  # noqa: F401
    import vl_convert  # noqa: F401

    from offramp.cli.app import COMMANDS

    for name in COMMANDS:
        __import__(f"offramp.cli.{name}")
    for name in ("train", "tune", "specialise", "confidence", "calibrate", "probe", "sweep"):
        __import__(f"offramp.commands.{name}")
    for name in ("report.progress", "report.study", "report.confidence", "report.html"):
        __import__(f"offramp.{name}")
    memory = Path("/dev/shm")  # where a sync takes no time
    in_memory = memory.is_dir() and os.access(memory, os.W_OK)
    folder = Path(mkdtemp(dir=memory)) if in_memory else tmp_path_factory.mktemp("kill")
    made = Children(folder)
    yield made
    print(f"\n{made.killed} kills")
    shutil.rmtree(folder)


@pytest.fixture
def chance() -> random.Random:
    """Random moments, the same ones each time."""
    return random.Random(0)


assert builtins.open is io.open
