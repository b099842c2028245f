"""Find and load the tasks of lm-evaluation-harness that a config names."""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from offramp.commands.evaluate.builtin import (
    add_named,
    builtin_folder,
    is_pattern,
    named_files,
)
from offramp.commands.evaluate.config import EvaluateConfig
from offramp.commands.evaluate.library import (
    NUMPY_SEED,
    harness,
    quiet,
    require_harness,
    sandboxed,
    seeded,
)
from offramp.commands.evaluate.yaml_files import find_code, yaml_files
from offramp.data.hub import hub_reachable, offline, one_line
from offramp.errors import ConfigError, OfframpError
from offramp.schema import shown

LOCAL_BUILDERS = ("json", "csv", "parquet", "text", "arrow")
"""Values of ``dataset_path`` that read files, and need no network if the files are here."""


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Loaded tasks, with their documents."""

    loaded: Mapping[str, Any]
    "The harness's tasks and groups by name."
    trusted: bool
    "Whether they may run code."

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep the harness quiet and seeded, and the tasks' templates in a sandbox."""
        with ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(seeded())
            if not self.trusted:
                stack.enter_context(sandboxed())
            for task in self.loaded["tasks"].values():  # they draw the examples of a question
                task.set_fewshot_seed(seed=NUMPY_SEED)
            yield


def load_tasks(config: EvaluateConfig) -> Tasks:
    """Load the tasks with their documents.

    Raises ConfigError for an unknown task, for a YAML file that is broken or would run code, and
    for documents that are not here and cannot be fetched.
    """
    require_harness()
    named = [_as_path(name) for name in config.tasks]
    given = [] if config.tasks_path is None else [Path(config.tasks_path).expanduser()]
    own = _own_files([*given, *(path for path in named if path)], trusted=config.trust_task_code)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(seeded())
        if not config.trust_task_code:
            stack.enter_context(sandboxed())
        manager = _manager(own, config)
        names = [
            found
            for name, path in zip(config.tasks, named, strict=True)
            for found in (_names_in(manager, path) if path else _matching(manager, name))
        ]
        _read_own(manager, own, trusted=config.trust_task_code)
        loaded = _loaded(manager, list(dict.fromkeys(names)))
        for name, task in loaded["tasks"].items():
            _prepare(name, task, config)
    return Tasks(loaded=loaded, trusted=config.trust_task_code)


def _as_path(name: str) -> Path | None:
    return Path(name).expanduser() if name.endswith((".yaml", ".yml")) else None


def _own_files(places: list[Path], *, trusted: bool) -> list[Path]:
    """Return the user's YAML files; a ConfigError if one would run code that is not trusted."""
    files = [file for place in places for file in yaml_files(place)]
    for file in files:
        code = find_code(file)
        if code and not trusted:
            raise ConfigError(
                f"tasks_path: expected tasks that run no code, got {code}; --trust-task-code runs "
                "the code of these tasks"
            )
    return [file.resolve() for file in files]


def _manager(own: list[Path], config: EvaluateConfig) -> Any:
    """Return the harness's index of tasks: the user's, and those of its own that are named.

    Raises ConfigError for a name that is nowhere.
    """
    index = harness("tasks").TaskManager
    folders = list(dict.fromkeys(str(file.parent) for file in own))
    manager = index(include_path=folders, include_defaults=False)
    _keep_only(manager, own)
    others = [name for name in config.tasks if not _as_path(name) and not _known(manager, name)]
    if not others:
        return manager
    files = named_files()
    for name in others:
        if name not in files and not is_pattern(name):
            raise _unknown(name, [*filter(_is_name, manager.task_index), *files])
    if add_named(manager.task_index, others, files):
        return manager
    manager = index(include_path=folders, include_defaults=True)
    _keep_only(manager, own, beside=builtin_folder())
    return manager


def _keep_only(manager: Any, own: list[Path], *, beside: Path | None = None) -> None:
    """Take what stands in other files of the user's folders out of the index."""
    for name, entry in list(manager.task_index.items()):
        path = entry.yaml_path
        if path is None or path.resolve() in own or (beside and path.is_relative_to(beside)):
            continue
        del manager.task_index[name]


def _names_in(manager: Any, path: Path) -> list[str]:
    file = path.resolve()
    found = [
        name
        for name, entry in manager.task_index.items()
        if entry.yaml_path is not None and entry.yaml_path.resolve() == file
    ]
    if not found:
        raise ConfigError(f"tasks: expected a YAML file of a task or a group, got {path}")
    return found


def _is_name(key: Any) -> bool:
    return isinstance(key, str)


def _known(manager: Any, name: str) -> list[str]:
    """Return the names in the index that a name or a pattern such as mmlu_* stands for."""
    return sorted(fnmatch.filter(filter(_is_name, manager.task_index), name))


def _matching(manager: Any, name: str) -> list[str]:
    found = _known(manager, name)
    if not found:
        raise _unknown(name, filter(_is_name, manager.task_index))
    return found


def _unknown(name: str, known: Iterable[str]) -> ConfigError:
    near = get_close_matches(name, list(known), n=1)
    hint = f"; perhaps {near[0]}" if near else ""
    return ConfigError(
        f"tasks: expected names of tasks of lm-evaluation-harness or of --tasks-path, "
        f"got {shown(name)}{hint}"
    )


def _read_own(manager: Any, own: list[Path], *, trusted: bool) -> None:
    """Read the user's tasks, whose data files may stand beside their YAML file."""
    read = harness("tasks._yaml_loader").load_yaml
    for entry in manager.task_index.values():
        if entry.yaml_path is None or entry.yaml_path.resolve() not in own:
            continue
        try:
            entry.cfg = read(entry.yaml_path, resolve_func=trusted)
        except Exception as error:  # code of a task can fail in any way
            raise ConfigError(f"{entry.yaml_path}: {one_line(error)}") from None
        options = entry.cfg.get("dataset_kwargs")
        if isinstance(options, dict):
            for key in ("data_files", "data_dir"):
                if key in options:
                    options[key] = _beside(options[key], entry.yaml_path.parent)
        entry.yaml_path = None  # so that the harness takes the config, and does not read again


def _beside(files: Any, folder: Path) -> Any:
    """Return data files with those that stand in the folder of the YAML file, and not here."""
    if isinstance(files, Mapping):
        return {key: _beside(value, folder) for key, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, folder) for value in files]
    if not isinstance(files, str) or not files or "://" in files or Path(files).is_absolute():
        return files
    here, there = (next(place.glob(files), None) for place in (Path(), folder))
    return str(folder / files) if there is not None and here is None else files


def _loaded(manager: Any, names: list[str]) -> Any:
    entries = [manager.task_index[name] for name in names]
    here = all((entry.cfg or {}).get("dataset_path") in LOCAL_BUILDERS for entry in entries)
    reachable = not here and hub_reachable()
    try:
        with nullcontext() if reachable else offline():
            return manager.load(names)
    except OfframpError:
        raise
    except Exception as error:  # a task, its templates and its data can fail in any way
        which = ", ".join(names)
        if here or reachable:
            raise ConfigError(
                f"{which}: expected a task that the harness can load, got: {one_line(error)}"
            ) from None
        raise ConfigError(
            f"{which}: expected tasks whose documents are on this machine, since the Hugging Face "
            f"hub cannot be reached, got: {one_line(error)}"
        ) from None


def _prepare(name: str, task: Any, config: EvaluateConfig) -> None:
    """Set the number of examples as the harness does: a task that fixes it at 0 keeps that."""
    if getattr(task, "UNSAFE_CODE", False) and not config.trust_task_code:
        raise ConfigError(
            f"{name}: expected a task that runs no code, got one that runs the model's answers; "
            "--trust-task-code runs them"
        )
    own = task.get_config("num_fewshot")
    if config.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=config.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
