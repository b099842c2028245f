"""Simulate what an audit says: its bound by the number of tokens, and how soon it flags a change.

The first table is the time-uniform upper bound on the mean risk of the tokens that left, beside
the bound of Clopper and Pearson, which may be looked at only once. The second one counts tokens
until ``ChangeDetector`` raises an alarm; its null is a range around the risk before the change, a
factor --margin wide in both directions. Beside it is the same recursion with the likelihood ratio
of the two risks, which it knows: it is nearly the best possible at this rate of false alarms
(Shiryaev and Roberts; Pollak 1985). Losses are 0 or 1.

    python benchmarks/audit_bounds.py
    python benchmarks/audit_bounds.py --before 0.03 --after 0.08
"""

import argparse
from collections.abc import Callable, Iterable

import numpy as np
from scipy.stats import beta

from offramp.calibration.audit import Audit
from offramp.calibration.change import ChangeDetector

CHANGES = ((0.02, 0.06), (0.02, 0.2), (0.05, 0.1), (0.05, 0.3), (0.1, 0.2), (0.1, 0.02))
BEFORE = 1000
"""Audited tokens before a change."""
MOST = 20_000
"""Audited tokens after a change at the most."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--run-length", type=float, default=5000)
    parser.add_argument("--margin", type=float, default=1.25)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--before", type=float)
    parser.add_argument("--after", type=float)
    chosen = parser.parse_args()
    print("| Risk | tokens that left | audited | upper bound | for one look |")
    print("|---|---|---|---|---|")
    for risk in (0.0, 0.01, 0.05, 0.2):
        for tokens in (1_000, 10_000, 100_000, 1_000_000):
            print(bound_row(risk, tokens, chosen.share, chosen.delta))
    print("\n| Risk before, after | tokens to the alarm, median | knowing both risks | ratio |")
    print("|---|---|---|---|")
    one = chosen.before is not None and chosen.after is not None
    for before, after in [(chosen.before, chosen.after)] if one else CHANGES:
        print(change_row(before, after, chosen), flush=True)


def bound_row(risk: float, tokens: int, share: float, delta: float) -> str:
    random = np.random.default_rng(0)
    found, once = [], []
    for _ in range(20):
        audit = Audit(share=share, delta=delta)
        for loss in random.random(random.binomial(tokens, share)) < risk:
            audit.audited_loss(float(loss))
        audit.left(max(0, tokens - audit.tokens))
        found.append(audit.upper_left)
        lost = audit.lost
        once.append(beta.ppf(1 - delta, lost + 1, audit.audited - lost) if audit.audited else 1.0)
    return (
        f"| {risk:g} | {tokens:,} | {round(tokens * share):,} | {np.median(found):.4f} | "
        f"{np.median(once):.4f} |"
    )


def change_row(before: float, after: float, chosen: argparse.Namespace) -> str:
    """The medians of audited tokens, divided by the share; each stream has 1,000 before."""
    random = np.random.default_rng(0)
    low, high = before / chosen.margin, before * chosen.margin
    ratios = np.array([(1 - after) / (1 - before), after / before])
    delays, best = [], []
    for _ in range(chosen.streams):
        risks = np.repeat([before, after], [BEFORE, MOST])
        losses = random.random(len(risks)) < risks
        detector = ChangeDetector(low=low, high=high, run_length=chosen.run_length)
        delays.append(delay(lambda loss, own=detector: own.observe(float(loss)), losses))
        state = [0.0]

        def known(loss: bool, state: list[float] = state) -> bool:
            state[0] = (state[0] + 1) * ratios[int(loss)]
            alarm = state[0] >= chosen.run_length
            state[0] = 0.0 if alarm else state[0]
            return bool(alarm)

        best.append(delay(known, losses))
    found, least = np.median(delays) / chosen.share, np.median(best) / chosen.share
    return f"| {before:g}, {after:g} | {found:,.0f} | {least:,.0f} | {found / least:.1f} |"


def delay(observe: Callable[[bool], bool], losses: Iterable[bool]) -> int:
    """Return the number of audited tokens from the change to the next alarm."""
    for count, loss in enumerate(losses, 1):
        if observe(loss) and count > BEFORE:
            return count - BEFORE
    return MOST


if __name__ == "__main__":
    main()
