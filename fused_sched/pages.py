"""Memory of the host in large pages.

A step reads and writes every stream once, front to back. In pages of 4 KB that is a page walk per 4 KB and stream, and
the processor's prefetchers stop at each page's end; in pages of 2 MB steps of 16.8M elements take 1 to 23% less time
(docs/measured.md). Linux gives large pages without being asked only where it is set to `always`; the usual setting is
`madvise`, for which memory is marked before it is first written.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import torch

_PAGE_BYTES = 1 << 21


def in_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, new and not yet written to, in large pages if it is on the CPU, as far as whole ones fit in."""
    if tensor.device.type == "cpu":
        begin = -(-tensor.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
        end = (tensor.data_ptr() + tensor.nbytes) // _PAGE_BYTES * _PAGE_BYTES
        madvise = _madvise() if begin < end else None
        if madvise is not None:
            madvise(begin, end - begin, mmap.MADV_HUGEPAGE)  # where that fails, pages are small ones
    return tensor


@cache
def _madvise() -> Any:
    """The system's function, None where it has no such pages."""
    if not (sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE")):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
