"""Log the figures of a run to TensorBoard or Weights & Biases, with accelerate's trackers."""

import threading
import time
import uuid
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from offramp.errors import ConfigError
from offramp.files import writing
from offramp.training.config import TrackerName, TrainConfig
from offramp.training.loop import Progress
from offramp.training.metrics_file import MetricsFile
from offramp.training.validation import Validation

LOG_EVERY = 10
"""Number of steps between two entries; an entry holds the means since the previous one."""
_INSTALL = {"tensorboard": "tensorboard", "wandb": "'offramp[wandb]'"}


def check_tracker(name: TrackerName) -> None:
    """Raise a ConfigError if the tracker's package is not installed."""
    if name == "none":
        return
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"tracker: expected {name} to be installed, and it is not: pip install {_INSTALL[name]}"
        ) from None


class RunLog:
    """Writes a run's loss, CE by layer, learning rate, tokens/s and validations into a folder.

    A resumed run continues the same log and replaces the entries of steps that it repeats.
    ``metrics`` is a CSV file for the same figures. With tracker ``none`` and without ``metrics``
    nothing is written.
    """

    def __init__(
        self,
        tracker: TrackerName,
        folder: Path,
        config: TrainConfig,
        *,
        metrics: Path | None = None,
    ) -> None:
        check_tracker(tracker)
        self.name, self.folder, self.config, self.metrics = tracker, folder, config, metrics
        self._file: MetricsFile | None = None
        self._tracker: Any = None
        self._show = threading.excepthook
        self._first: int | None = None
        self._recent: list[Progress] = []
        self._last = 0.0  # when the last step ended; 0 after other work, such as a validation
        self._timed, self._seconds = 0, 0.0

    def on_step(self, progress: Progress) -> None:
        """Record a step."""
        if self._silent:
            return
        now = time.perf_counter()
        if self._last:
            self._timed, self._seconds = self._timed + 1, self._seconds + now - self._last
        self._last = now
        self._first = self._first or progress.step
        self._recent.append(progress)
        if progress.step % LOG_EVERY == 0 or progress.step == progress.total_steps:
            self._write_steps()

    def on_validation(self, validation: Validation) -> None:
        """Write the figures of a validation."""
        if self._silent:
            return
        ppl = {f"validation/ppl_{layer}": ppl for layer, ppl in validation.exit_ppl.items()}
        self._write(validation.step, {"validation/score": validation.score, **ppl})
        self._last = 0.0

    def close(self) -> None:
        """Write the remaining figures and close the log."""
        try:
            if self._recent:
                self._write_steps()
            if self._tracker is not None:
                with writing(self.folder):
                    self._tracker.finish()
        finally:
            self._tracker = None
            threading.excepthook = self._show

    @property
    def _silent(self) -> bool:
        return self.name == "none" and self.metrics is None

    def _write_steps(self) -> None:
        recent, latest = self._recent, self._recent[-1]
        values = {
            "train/loss": _mean([progress.loss for progress in recent]),
            "train/learning_rate": latest.lr,
        }
        for layer in sorted({layer for progress in recent for layer in progress.losses}):
            parts = [p.losses[layer] for p in recent if layer in p.losses]
            values[f"train/cross_entropy_{layer}"] = _mean(parts)
        if self._timed:
            tokens = self._timed * self.config.batch_size * self.config.seq_len
            values["train/tokens_per_second"] = tokens / self._seconds
        self._recent, self._timed, self._seconds = [], 0, 0.0
        self._write(latest.step, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.metrics is not None:
            if self._file is None:
                self._file = MetricsFile(self.metrics, first_step=self._first or step)
            self._file.write(step, {_column(name): value for name, value in values.items()})
        if self.name == "none":
            return
        with writing(self.folder):
            if self._tracker is None:
                threading.excepthook = _silent
                self._tracker = self._start()
            self._tracker.log(values, step=step)

    def _start(self) -> Any:
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        self.folder.mkdir(parents=True, exist_ok=True)
        if self.name == "tensorboard":
            tracker = TensorBoardTracker("", self.folder, purge_step=self._first)
        else:
            id_file = self.folder / "wandb-id.txt"
            if not id_file.exists():
                id_file.write_text(uuid.uuid4().hex, encoding="utf-8")
            about = {"id": id_file.read_text(encoding="utf-8"), "config": asdict(self.config)}
            tracker = WandBTracker("offramp", dir=self.folder, resume="allow", **about)
        tracker.start()
        return tracker


def _silent(failed: threading.ExceptHookArgs) -> None:
    """Print no traceback for an OSError of TensorBoard's thread; its next call raises it."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def _column(name: str) -> str:
    """Return the column of a tag: train/loss is loss, validation/ppl_2 is validation_ppl_2."""
    return name.removeprefix("train/").replace("/", "_")


def _mean(values: list[torch.Tensor]) -> float:
    return float(torch.stack(values).mean())
