"""``EarlyExitLM.evaluate``: tasks of lm-evaluation-harness from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offramp.calibration.certificate import Certificate
from offramp.commands.evaluate.config import EvaluateConfig
from offramp.commands.evaluate.row import EvaluationRow
from offramp.commands.evaluate.run import check_thresholds, evaluate
from offramp.commands.evaluate.scoring import exits_for
from offramp.commands.evaluate.tasks import load_tasks
from offramp.exits.default_confidence import Threshold
from offramp.models.open import OpenedModel
from offramp.options import config_of
from offramp.report.progress import call_bar
from offramp.report.result import ResultTable


class RunsTasks:
    """The part of ``EarlyExitLM`` that runs tasks."""

    _opened: OpenedModel

    def evaluate(
        self,
        tasks: str | Sequence[str],
        *,
        threshold: Threshold | None = None,
        thresholds: Sequence[Threshold] | None = None,
        certificate: Certificate | str | Path | None = None,
        confidence: str | None = None,
        missing_kv: str | None = None,
        progress: bool = False,
        **options: Any,
    ) -> ResultTable[EvaluationRow]:
        """Run tasks of lm-evaluation-harness. Returns a row for each task and each way to run it.

        Args:
            tasks: Names of tasks or groups, or of YAML files; one string may hold several between
                commas.
            threshold: Confidence at which tokens exit, as in ``generate``; None is full depth.
            thresholds: With ``compare=True``: several of them.
            certificate: Take the thresholds of this certificate, or of a file of
                ``offramp calibrate``.
            confidence: The measure of the thresholds.
            missing_kv: ``propagate`` (default), ``recompute`` or ``exact``.
            progress: Show a progress bar.
            **options: Fields of ``EvaluateConfig``, such as ``limit``, ``num_fewshot``,
                ``batch_size``, ``tasks_path``, ``compare`` or ``static``.

        Raises:
            ConfigError: A task is unknown, cannot be loaded or would run code, an option does not
                fit, or the harness is not installed.
        """
        names = tasks.split(",") if isinstance(tasks, str) else tasks
        options["tasks"] = tuple(map(str, names))
        if isinstance(options.get("tasks_path"), Path):
            options["tasks_path"] = str(options["tasks_path"])
        if isinstance(options.get("static"), int):
            options["static"] = (options["static"],)
        config = config_of(EvaluateConfig, options)
        chosen = {"threshold": threshold, "confidence": confidence, "missing_kv": missing_kv}
        exits = exits_for(self._opened, certificate, chosen)
        check_thresholds(config, exits, thresholds)
        loaded = load_tasks(config)
        with call_bar("evaluate", shown=progress) as on_progress:
            content = evaluate(
                self._opened,
                loaded,
                config,
                exits,
                thresholds=thresholds,
                on_progress=on_progress,
            )
        rows = [EvaluationRow(**row) for row in content["evaluations"]]
        return ResultTable(rows=rows, content=content)
