"""The command ``offramp``. Printing and progress happen here; the library itself is silent.

A user's mistake is one sentence on standard error and exit code 2; Ctrl-C is exit code 130,
SIGTERM 143. A module a command.
"""

import sys
import time
from collections.abc import Sequence

import cyclopts

from offramp.cli import (  # noqa: F401  (they register themselves)
    bench,
    calibrate,
    confidence,
    export,
    generate,
    probe,
    recipe,
    reproduce,
    specialise,
    study,
    sweep,
    train,
    tune,
)
from offramp.cli.base import FLAGS, app, console
from offramp.errors import OfframpError

INTERRUPTED = 130
LAUNCHER_SECONDS = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 2 (a user's mistake) or 130 (interrupted)."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (cyclopts.CycloptsError, OfframpError) as error:
        sentence = " ".join(str(error).split())
        field, colon, rest = sentence.partition(":")  # a config's field, by its flag's name
        if console.quiet:  # rank 0 says it, and its launcher ends this process meanwhile,
            time.sleep(LAUNCHER_SECONDS)  # unless only this one failed
        print(f"offramp: {FLAGS.get(field, field)}{colon}{rest}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("offramp: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
