"""Say in one sentence that there is not enough memory. Imports no PyTorch."""

import errno

_SIGNS = (
    "bad_alloc",
    "can't allocate memory",
    "cannot allocate memory",
    "can't start new thread",
    "failed to map segment",
    "not enough memory",
    "out of memory",
    "unable to allocate",
    "unable to mmap",
)
"""What errors of other types than MemoryError say, in lower case."""


def _is_limited() -> bool:
    try:
        import resource
    except ImportError:  # not on every platform
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def memory_sentence(error: BaseException) -> str | None:
    """Return a sentence if memory ran out, or None for another error.

    NumPy, PyTorch and the dynamic linker each raise an error of another type.
    """
    said = " ".join(str(error).split()).rpartition("Original error was: ")[2]  # NumPy's help
    if isinstance(error, OSError) and error.errno is not None:
        ran_out = error.errno == errno.ENOMEM
    elif isinstance(error, SystemError):  # an import failed without an exception
        ran_out = _is_limited()
    else:
        ran_out = isinstance(error, MemoryError) or any(sign in said.lower() for sign in _SIGNS)
    if not ran_out:
        return None
    cause = f" ({said[-160:].lstrip('. ')})" if said else ""
    return (
        f"memory: expected enough for this command, but the system gave no more{cause}; "
        "a smaller model, a smaller batch or shorter windows need less, and ulimit -v may limit it"
    )
