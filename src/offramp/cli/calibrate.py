"""offramp calibrate."""

from pathlib import Path
from typing import Any

from offramp.calibration.certificate import Certificate
from offramp.calibration.promise import DEFAULT_DELTA, Method, Promise
from offramp.calibration.thresholds import thresholds_flag
from offramp.cli.base import (
    Device,
    Dtype,
    Threads,
    check_out_file,
    console,
    open_for,
    output,
    say,
    use,
)
from offramp.cli.confidence import warn
from offramp.errors import ConfigError
from offramp.files import write_json


def calibrate(
    model: Path,
    *,
    corpus: str,
    risk: str | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    method: Method | None = None,
    confidence: str | None = None,
    compute_budget: float | None = None,
    check: Path | None = None,
    out: Path | None = None,
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype = "float32",
) -> None:
    """Find thresholds that keep a promise and write a certificate; or keep a compute budget.

    Parameters
    ----------
    model
        A folder that ``offramp train`` or ``offramp tune`` wrote, a Hugging Face checkpoint, or
        smollm2-135m.
    corpus
        The text to calibrate on, like that of later use and not that of training; with --check
        the new text.
    risk
        disagreement (share of tokens where the exit's first choice is not the full model's), or
        nll-gap (nats a token, clipped). Default: disagreement.
    epsilon
        Largest risk that is allowed (default: 0.02).
    delta
        How often the promise may fail over draws of the text (default: 0.05).
    method
        ltt (Learn-then-Test, the default) or crc (conformal risk control: keeps the average).
    confidence
        The measure whose thresholds are searched (default: max_prob).
    compute_budget
        Instead of a risk: the thresholds of least loss whose FLOPs% is at most this.
    check
        A certificate: say with a test whether its promise still holds on the corpus.
    out
        Write the certificate (or the budget's thresholds, or the check) to this JSON file.
    dtype
        Precision of the model.
    """
    check_out_file(out)
    asked: dict[str, Any] = {"risk": risk, "epsilon": epsilon, "delta": delta, "method": method}
    promise = {name: value for name, value in asked.items() if value is not None}
    modes = [name for name, used in (("check", check), ("compute_budget", compute_budget)) if used]
    if len(modes) + bool(promise) > 1 and not (check and set(promise) <= {"delta"}):
        given = ", ".join(f"--{name.replace('_', '-')}" for name in (*promise, *modes))
        raise ConfigError(f"calibrate: expected a promise, a budget or a check, got {given}")
    if check is not None and confidence is not None:
        raise ConfigError("confidence: expected none with --check, since the certificate names it")
    kept = Promise(**promise) if check is None else Promise()
    checked = None if check is None else Certificate.load(check)

    from offramp.commands.calibrate import certify, keep_compute_budget
    from offramp.commands.calibrate import check as run_check
    from offramp.report.confidence import certificate_table, drift_sentence
    from offramp.report.progress import bars
    from offramp.report.sweep import sweep_table

    use(device, threads)
    with bars(console) as drawn:
        common: dict[str, Any] = {
            "on_tokens": lambda done, total: drawn.show(
                "trace", done=done, total=total, text="tokens"
            ),
        }
        measure = confidence or "max_prob"
        opened = open_for(model, device=device, dtype=dtype, stored=checked)
        if checked is not None:
            level = DEFAULT_DELTA if delta is None else delta
            content = about = run_check(opened, corpus, checked, level=level, **common)
        elif compute_budget is not None:
            content = about = keep_compute_budget(
                opened, corpus, compute_budget, confidence=measure, **common
            )
        else:
            certificate, text = certify(opened, corpus, kept, confidence=measure, **common)
            content, about = certificate.content(), text.about()
    if check is not None:
        output().print(drift_sentence(content), highlight=False, soft_wrap=True)
    elif compute_budget is not None:
        output().print(sweep_table(content))
        flag = thresholds_flag([float(value) for value in content["thresholds"]])
        output().print(f"--thresholds {flag}", highlight=False, markup=False, soft_wrap=True)
    else:
        output().print(certificate_table(content))
        _say_too_few(certificate, kept)
        _say_dear(certificate)
    warn(model, corpus, about)
    if out:
        write_json(out, content)


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
