"""lm-evaluation-harness, imported on first use and kept quiet: standard output stays offramp's."""

import importlib
import importlib.util
import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import numpy as np

from offramp.errors import ConfigError, OfframpWarning

LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "evaluate")
SEED, NUMPY_SEED = 0, 1234
"""Those of the harness, so that its tasks choose the same examples."""
_POOLS = "DISABLE_MULTIPROC"
"""The harness's switch that keeps the resamples of a standard error in this process."""


def require_harness() -> None:
    """Raise a ConfigError unless the harness is installed; nothing is imported."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluate: expected lm-evaluation-harness, which is not installed; "
            "pip install 'offramp[eval]'"
        )


def harness(module: str) -> Any:
    """Return a module of the package ``lm_eval``, which is imported on first use."""
    require_harness()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(f"lm_eval.{module}")
    except ImportError as error:
        raise ConfigError(
            f"evaluate: expected lm-evaluation-harness and the packages that it needs, got: "
            f"{error}; pip install 'offramp[eval]'"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off what the harness logs, draws, prints and warns of, and its worker processes."""
    task: Any = harness("api.task")
    datasets: Any = importlib.import_module("datasets")
    bars: Any = importlib.import_module("tqdm")
    with ExitStack() as stack:
        for name in LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if datasets.is_progress_bar_enabled():
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        pools = os.environ.get(_POOLS)
        stack.callback(_restore, pools)
        os.environ[_POOLS] = "1"
        for module in (task, bars):
            stack.callback(setattr, module, "tqdm", module.tqdm)
            module.tqdm = _no_bar
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", OfframpWarning)
        nowhere = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123
        stack.enter_context(redirect_stdout(nowhere))
        yield


def _restore(pools: str | None) -> None:
    if pools is None:
        os.environ.pop(_POOLS, None)
    else:
        os.environ[_POOLS] = pools


def _no_bar(items: Any, *_: Any, **__: Any) -> Any:
    """Stand for ``tqdm`` where the harness draws a bar."""
    return items


@contextmanager
def seeded() -> Iterator[None]:
    """Seed what tasks draw from as the harness does, and restore it afterwards."""
    before, numbers = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numbers)


@contextmanager
def sandboxed() -> Iterator[None]:
    """Render the templates of tasks in Jinja's sandbox, where they cannot run code."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    utils = harness("utils")
    plain = utils.env
    safe = ImmutableSandboxedEnvironment(
        loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=True
    )
    safe.filters.update(plain.filters)
    utils.env = safe
    try:
        yield
    finally:
        utils.env = plain
