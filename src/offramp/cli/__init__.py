"""The command ``offramp``. Printing and progress happen here; the library itself is silent.

A user's mistake is one sentence on standard error and exit code 2; Ctrl-C is exit code 130,
SIGTERM 143. A module a command, which imports PyTorch and the work only once its flags are read.
"""

import sys
from collections.abc import Sequence

from offramp.cli.interrupts import INTERRUPTED, LINE, exit_at_once, work_begins
from offramp.cli.streams import BROKEN_PIPE, output_failure, prepare_streams


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 2 (a user's mistake) or 130 (interrupted).

    If standard output is a pipe that was closed, as by ``| head``, it ends with 141, silently.
    """
    prepare_streams()
    try:
        if arguments is None:  # this is the process of the command line, not a test or a notebook
            exit_at_once()
        from offramp.cli.app import run

        run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(LINE, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        output_failure()
        sys.exit(BROKEN_PIPE)
    except OSError as error:
        if (reason := output_failure(error)) is None:
            raise
        print(f"offramp: standard output: cannot be written: {reason}", file=sys.stderr)
        sys.exit(2)
    finally:
        work_begins()
