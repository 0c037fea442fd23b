"""State on the CPU lies in memory that was marked for large pages, before and after it was offloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Backend

from fused_sched.pages import in_large_pages

MB = 1 << 20

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="the system has no large pages"
)


def is_marked(address: int) -> bool:
    """Whether the mapping that holds an address carries the flag that madvise() sets."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(bound, 16) for bound in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in rest
    raise AssertionError(f"{address:#x} lies in no mapping")


def middle(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() + tensor.nbytes // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_marked(get_backend: Callable[[str], Backend], dtype: torch.dtype) -> None:
    param = torch.zeros(4 * MB, dtype=dtype, requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = get_backend("cpu").optimizer([param], lr=0.5)
    optimizer.step()
    for _ in range(2):
        state = optimizer.state[param]
        large = [name for name, value in state.items() if value.nbytes >= 8 * MB]
        assert {"exp_avg", "exp_avg_sq"} <= set(large)
        assert all(is_marked(middle(state[name])) for name in large)
        optimizer.offload()
        optimizer.reload()
    optimizer.step()
    assert optimizer.clock == 2


def test_what_holds_no_whole_page_is_left_alone() -> None:
    large = torch.empty(64 * MB, dtype=torch.uint8)  # beyond what malloc takes from memory it had before
    part = large[: 2 * MB - 1]
    assert in_large_pages(part) is part
    assert not is_marked(middle(part))
