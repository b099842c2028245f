"""What commands that generate text share: their flags, the colours of exits, and the figures.

Imports no PyTorch.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from offramp.calibration.thresholds import StoredThresholds
from offramp.cli.base import UNTRAINED, console, say
from offramp.cli.plain_text import write_text
from offramp.cli.streams import utf8
from offramp.errors import ConfigError
from offramp.generation.config import GenerateConfig, MissingKVChoice
from offramp.models.missing_kv import EXACT

if TYPE_CHECKING:
    from offramp.generation.generate import Generation
    from offramp.models.open import OpenedModel

SHALLOW, DEEP = (70, 170, 240), (240, 150, 60)
"""Colours of the first and of the last exit before full depth."""
ConfigFlags = Parameter(
    name="*",
    parse=re.compile("^(?!(threshold|decay|confidence|missing_kv|stop_strings|stop_tokens)$)"),
)
"""The fields of a config as flags, without those that a command's own flags set."""
Thresholds = Annotated[
    str | None,
    Parameter(
        name="--threshold",
        allow_leading_hyphen=True,
        help="Confidence at which tokens exit; one for each exit but the last is written 0.9:0.8. "
        "Without it every token runs through all layers.",
    ),
]
Decay = Annotated[
    float | None,
    Parameter(
        name="--decay",
        help="With --threshold: let the threshold fall along the text (CALM). At new token t, "
        "counted from 0, of N it is 0.9 THRESHOLD + 0.1 exp(-DECAY t / N), where N is "
        "--max-new-tokens.",
    ),
]
Measure = Annotated[
    str | None,
    Parameter(
        name="--confidence",
        help="The confidence measure, for exits and drafts (default: that of the certificate, or "
        "gain where it was fitted, else max_prob; drafts: max_prob). Without it, a threshold from "
        "0 to 1 on gain is the share of the last layer's probability that an exit must keep.",
    ),
]
KeysValues = Annotated[
    MissingKVChoice | None,
    Parameter(
        name="--missing-kv",
        help="Keys and values that a later token needs above an exit: propagate computes them "
        "from the state at the exit (default), recompute runs the layers. Complete exits (those "
        "of a model of train --kv-source) need no choice, since both are the same; exact refuses "
        "a model whose exits are not complete.",
    ),
]


def with_flags(
    config: GenerateConfig,
    stored: StoredThresholds | None,
    *,
    thresholds: str | None,
    decay: float | None,
    confidence: str | None,
    missing_kv: MissingKVChoice | None,
    stop: Sequence[str] | None,
) -> GenerateConfig:
    """Return the config with the values of the command's own flags.

    Raises ConfigError for flags beside a certificate, which contains their values.
    """
    if stored is not None:
        given = {"threshold": thresholds, "decay": decay, "confidence": confidence}
        for name, value in given.items():
            if value is not None:
                own = "which has its own" if name == "confidence" else "whose thresholds hold"
                raise ConfigError(f"{name}: expected none with --certificate, {own}")
    return replace(
        config,
        threshold=None if thresholds is None else parse_threshold(thresholds),
        decay=decay,
        confidence=config.confidence if confidence is None else confidence,
        missing_kv=missing_kv or config.missing_kv,
        stop_strings=tuple(utf8(each) or "" for each in stop or ()),
    )


def for_model(
    config: GenerateConfig,
    opened: "OpenedModel",
    stored: StoredThresholds | None,
    *,
    missing_kv: MissingKVChoice | None,
    stop_token: Sequence[str] | None,
) -> GenerateConfig:
    """Return the config with the thresholds of a file and with the ids of stop tokens."""
    from offramp.commands.generate import with_thresholds
    from offramp.data.token_names import token_id

    if stored is not None:
        config = with_thresholds(config, stored, missing_kv=missing_kv, model=opened.model)
    size = opened.model.vocab_size
    written = [utf8(each) or "" for each in stop_token or ()]
    ids = tuple(token_id(opened.tokenizer, each, size) for each in written)
    return replace(config, stop_tokens=ids)


def say_about_exits(config: GenerateConfig, opened: "OpenedModel") -> None:
    """Print a line if untrained exits are used, and one if drafts may change the text."""
    from offramp.generation.promise import drafts_note

    if uses_exits(config) and not opened.exits_trained:
        say(f"{opened.name}: {UNTRAINED}.")
    if config.speculative and (note := drafts_note(opened.model)):
        say(note)


def uses_exits(config: GenerateConfig) -> bool:
    """Return whether tokens may leave at an exit, or be drafted by one."""
    return config.threshold is not None or config.speculative


def parse_threshold(written: str) -> float | tuple[float, ...]:
    """Return a threshold, or one for each exit but the last, which are written 0.9:0.8."""
    try:
        numbers = tuple(float(part) for part in written.split(":"))
    except ValueError:
        raise ConfigError(
            f"threshold: expected a number, or one for each exit such as 0.9:0.8, got {written!r}"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]


def timed(
    generation: "Generation", *, show: Callable[[str, int], None] | None
) -> tuple[float, float | None]:
    """Run to the end: seconds to the first token, and tokens per second after it."""
    began = time.perf_counter()
    first: float | None = None
    for token in generation:
        first = first or time.perf_counter()
        if show:
            show(token.text, token.exit_layer)
    ended = time.perf_counter()
    count, seconds = len(generation.completion.tokens), ended - (first or began)
    rate = (count - 1) / seconds if count > 1 and seconds > 0 else None
    return (first or ended) - began, rate


def show_tokens(shown: Console, opened: "OpenedModel") -> Callable[[str, int], None]:
    """Return a function that writes the text of a token in the colour of its exit layer."""
    return lambda text, exit_layer: write_text(shown, text, _colour(exit_layer, opened))


def say_legend(shown: Console, opened: "OpenedModel") -> None:
    """Print the colours of the exits on standard error, if standard output ``shown`` has them."""
    if shown.is_terminal and shown.color_system and not shown.no_color:
        console.print(_legend(opened))


def _colour(exit_layer: int, opened: "OpenedModel") -> str:
    """The style of a token's exit; tokens of full depth are plain."""
    last = opened.model.num_layers
    if exit_layer == last:
        return ""
    share = (exit_layer - 1) / max(1, last - 1)
    mixed = [round(a + share * (b - a)) for a, b in zip(SHALLOW, DEEP, strict=True)]
    return f"rgb({mixed[0]},{mixed[1]},{mixed[2]})"


def _legend(opened: "OpenedModel") -> Text:
    line = Text("exit layer: ")
    for layer in opened.model.exit_layers:
        name = f"{layer} (full depth)" if layer == opened.model.num_layers else f"{layer}  "
        line.append(f"\u25a0 {name}", style=_colour(layer, opened))
    return line


def say_summary(
    generation: "Generation", opened: "OpenedModel", *, rate: float | None, prefill: float
) -> None:
    """Print the number of tokens, their speed and their mean layers on standard error."""
    parts = [f"{len(generation.completion.tokens)} tokens"]
    if rate is not None:
        parts.append(f"{rate:.1f} tokens/s after {prefill:.2f} s to the first")
    parts.append(f"mean layers {generation.mean_layers:.1f} of {opened.model.num_layers}")
    if generation.acceptance_rate is not None:
        parts[-1] += " (rejected drafts included)"
        parts.append(f"acceptance rate {100 * generation.acceptance_rate:.0f}%")
    if generation.missing_kv == EXACT:
        parts.append(f'missing_kv="{EXACT}"')
    say("; ".join(parts))
