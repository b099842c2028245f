"""Ctrl-C while the program starts: one line, and exit code 130.

Most of the start is importing PyTorch. An exception that a signal raises there may be swallowed,
or shown as a traceback, by whatever is being imported; nothing is written yet, so the process ends
at once instead. Imports next to nothing, since it is needed before everything else.
"""

import os
import signal

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
LINE = "offramp: interrupted"


def exit_at_once() -> None:
    """From now on Ctrl-C prints its line and ends the process, unless it is handled or ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def work_begins() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt again: there is work to be stopped in order."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, frame: object) -> None:
    os.write(2, f"{LINE}\n".encode())
    os._exit(INTERRUPTED)
