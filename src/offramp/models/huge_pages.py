"""Keep weights in huge pages of memory, which decoding reads faster.

Decoding a token reads every weight once. In pages of 4 KiB the processor has to look up an address
for every 4 KiB that it reads; a huge page needs one look-up for 2 MiB. Linux uses huge pages where
a program asks for them (``transparent_hugepage`` set to ``madvise`` or ``always``).
"""

import ctypes
import sys
import time
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor

HUGE_PAGE = 1 << 21
"""Bytes of a huge page."""
_SMALL = 1 << 18
"""Size of tensors, in bytes, that are left where they are."""
SECONDS = 2.0
"""Longest time that is spent on moving tensors; where memory is in pieces, each page takes long."""
_HUGEPAGE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE, and MADV_COLLAPSE of Linux 6.1 and newer


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Ask the operating system to keep large CPU tensors in huge pages, at their addresses.

    Returns the number of huge pages that now hold them. It is 0 outside Linux, where the system
    does not allow huge pages, and for tensors that a file is mapped to. Linux older than 6.1 moves
    them later, in the background, and this returns 0. It also moves what this does not within
    ``SECONDS``.
    """
    advise = _madvise()
    if advise is None:
        return 0
    pages: set[int] = set()
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.nbytes >= _SMALL:
            first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            pages.update(range(first // HUGE_PAGE, -(-end // HUGE_PAGE)))
    addresses = [ctypes.c_void_p(page * HUGE_PAGE) for page in sorted(pages)]
    asked = [each for each in addresses if advise(each, HUGE_PAGE, _HUGEPAGE) == 0]
    held, ends = 0, time.monotonic() + SECONDS
    for address in asked:
        held += advise(address, HUGE_PAGE, _COLLAPSE) == 0
        if time.monotonic() > ends:
            break
    return held


@cache
def _madvise() -> Any:
    """Return the C library's ``madvise``, or None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    found.restype = ctypes.c_int
    return found
