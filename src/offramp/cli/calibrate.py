"""offramp calibrate."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from offramp.calibration.certificate import Certificate
from offramp.calibration.promise import Promise
from offramp.calibration.thresholds import thresholds_flag
from offramp.cli.base import (
    Base,
    Bos,
    Device,
    Dtype,
    Exits,
    Model,
    Threads,
    Weights,
    check_out_file,
    open_for,
    output,
    say,
    say_verdict,
    token_bar,
    use,
    warn,
)
from offramp.cli.on_generation import check_source, run_on_generation
from offramp.commands.on_generation.config import WriteConfig
from offramp.errors import ConfigError
from offramp.exits.confidence_names import check_confidence
from offramp.files import write_json

if TYPE_CHECKING:
    from offramp.models.open import OpenedModel

OnTokens = Callable[[int, int], None]
Results = tuple[dict[str, Any], dict[str, Any]]
"""What is written, and what is said of the text."""


def calibrate(
    model: Model,
    promise: Annotated[Promise | None, Parameter(name="*")] = None,
    texts: Annotated[WriteConfig | None, Parameter(name="*")] = None,
    *,
    corpus: str | None = None,
    prompts: Path | None = None,
    confidence: str | None = None,
    compute_budget: float | None = None,
    check: Path | None = None,
    out: Path | None = None,
    base: Base = None,
    exits: Exits = None,
    bos: Bos = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype = "float32",
    weights: Weights = None,
) -> None:
    """Find thresholds with a guarantee and write a certificate; or keep a compute budget.

    With --on generation the guarantee covers texts that the model writes itself: every prompt is
    continued at full depth and with thresholds, from careful to bold.

    Parameters
    ----------
    corpus
        The text to calibrate on: like that of later use, and not that of training. With --check
        it is the new text. With --on generation prompts are cut from it.
    prompts
        With --on generation: a file with a prompt in each line, or a .jsonl file whose lines are
        strings or objects with a "prompt" or the "messages" of a chat.
    confidence
        The measure whose thresholds are searched (default: gain where it was fitted, else
        max_prob).
    compute_budget
        Instead of a risk: find the thresholds of least loss whose FLOPs% is at most this.
    check
        A certificate: test whether its guarantee still holds on the corpus.
    out
        Write the certificate (or the thresholds of the budget, or the check) to this JSON file.
    """
    _check_mode(promise, compute_budget, check, confidence)
    check_out_file(out)
    checked = None if check is None else Certificate.load(check)
    written = promise is not None and promise.on == "generation"
    if checked is not None:
        written = checked.on_generation
    check_source(corpus, prompts, texts, written=written)

    use(device, threads)
    opened = open_for(
        model,
        base=base,
        exits=exits,
        bos=bos,
        device=device,
        dtype=dtype,
        weights=weights,
        stored=checked,
    )
    kept = promise or Promise()
    if written:
        source = corpus if prompts is None else prompts
        assert source is not None
        run_on_generation(
            opened, source, kept, texts or WriteConfig(), checked, measure=confidence, out=out
        )
        return
    assert corpus is not None
    with token_bar("trace") as on_tokens:
        if checked is not None:
            show, results = _check(opened, corpus, checked, kept, on_tokens)
        elif compute_budget is not None:
            show, results = _budget(opened, corpus, compute_budget, confidence, on_tokens)
        else:
            show, results = _certify(opened, corpus, kept, confidence, on_tokens)
    content, about = results
    show()
    warn(model, corpus, about)
    if out:
        write_json(out, content)


def _check_mode(
    promise: Promise | None, budget: float | None, check: Path | None, confidence: str | None
) -> None:
    """Refuse flags of more than one of the command's three jobs."""
    level_only = check is not None and promise == Promise(delta=promise.delta if promise else 0.05)
    modes = {
        "a promise": promise is not None and not level_only,
        "--compute-budget": budget is not None,
        "--check": check is not None,
    }
    if sum(modes.values()) > 1:
        given = ", ".join(name for name, used in modes.items() if used)
        raise ConfigError(f"calibrate: expected a promise, a budget or a check, got {given}")
    if check is not None and confidence is not None:
        raise ConfigError("confidence: expected none with --check, since the certificate names it")
    if confidence is not None:
        check_confidence(confidence)


def _check(
    opened: "OpenedModel",
    corpus: str,
    certificate: Certificate,
    level: Promise,
    on_tokens: OnTokens,
) -> tuple[Callable[[], None], Results]:
    from offramp.commands.calibrate import check
    from offramp.report.confidence import drift_sentence

    content = check(opened, corpus, certificate, level=level.delta, on_tokens=on_tokens)

    def show() -> None:
        say_verdict(drift_sentence(content))
        if content["same_corpus"]:
            say(
                f"{corpus}: this is the text that the certificate was made with, so the check says "
                "nothing about new text."
            )

    return show, (content, content)


def _budget(
    opened: "OpenedModel", corpus: str, budget: float, measure: str | None, on_tokens: OnTokens
) -> tuple[Callable[[], None], Results]:
    from offramp.commands.calibrate import keep_compute_budget
    from offramp.report.sweep import sweep_table, sweep_verdict

    content = keep_compute_budget(opened, corpus, budget, confidence=measure, on_tokens=on_tokens)

    def show() -> None:
        shown = output()
        shown.print(sweep_table(content, width=shown.width))
        flag = thresholds_flag([float(value) for value in content["thresholds"]])
        say_verdict(f"--thresholds {flag}")
        say_verdict(sweep_verdict(content))

    return show, (content, content)


def _certify(
    opened: "OpenedModel", corpus: str, promise: Promise, measure: str | None, on_tokens: OnTokens
) -> tuple[Callable[[], None], Results]:
    from offramp.commands.calibrate import certify
    from offramp.report.confidence import certificate_table, certificate_verdict

    certificate, text = certify(opened, corpus, promise, confidence=measure, on_tokens=on_tokens)
    content = certificate.content()

    def show() -> None:
        shown = output()
        shown.print(certificate_table(content))
        say_verdict(certificate_verdict(content))
        _say_too_few(certificate, promise)
        _say_dear(certificate)

    return show, (content, text.about())


def _say_dear(certificate: Certificate) -> None:
    flops = certificate.expected_flops_pct
    if flops is not None and flops > 100:
        say(
            f"These thresholds cost {flops:.1f}% of the full model's FLOPs: evaluating the exits "
            "costs more than the layers it saves. Try --confidence gate or gain, or fewer exits."
        )


def _say_too_few(certificate: Certificate, promise: Promise) -> None:
    if not certificate.is_full_model:
        return
    if certificate.n < promise.sequences_needed:
        say(
            f"Nothing can be certified: expected at least {promise.sequences_needed} sequences, "
            f"got {certificate.n}; the certificate is for the full model."
        )
    else:
        say(
            "No threshold of the path keeps the promise on this text; the certificate is for the "
            "full model."
        )
