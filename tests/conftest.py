"""The four backends as fixtures. A case that needs a GPU carries the marker `cuda` and skips without one.

Where torch sees a GPU those cases fail instead of skipping if the backend cannot be used: a broken build would pass for
a green run. FUSED_SCHED_REQUIRE_CUDA=1 asks for that anywhere, =0 nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

import pytest
import torch

import fused_sched
from fused_sched import FusedScheduledAdam

#: Older torch's own warnings: SequentialLR's of itself, the compiler's cache's, random DTensors', the profiler's.
OF_OLDER_TORCH = [
    "The epoch parameter in `scheduler.step",
    "Skipping serialization of skipfiles_inline_module_allowlist",
    "DTensor random operators may not have complete support",
    "Warning. Profiler clears events at the end of each cycle",
]


def pytest_configure(config: pytest.Config) -> None:
    if torch.__version__ < (2, 13):
        for message in OF_OLDER_TORCH:
            config.addinivalue_line("filterwarnings", f"ignore:{message}:UserWarning")


COMPILED = ["cpu", "cuda-on-cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
BACKENDS = ["reference", *COMPILED]
#: The reference backend with tensors on a GPU, for the files that ask for it.
REFERENCE_ON_CUDA = "reference-on-cuda"
REFERENCE_EVERYWHERE = [*BACKENDS, pytest.param(REFERENCE_ON_CUDA, marks=pytest.mark.cuda)]
ON_CUDA = ("cuda", REFERENCE_ON_CUDA)


@dataclass(frozen=True)
class Backend:
    """A usable backend, and the device whose tensors it takes."""

    name: str
    device: torch.device

    def __str__(self) -> str:
        return self.name

    def optimizer(self, params: Iterable[Any], **options: Any) -> FusedScheduledAdam:
        return FusedScheduledAdam(params, backend=self.name, **options)

    def parameter(self, values: Any, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.as_tensor(values, dtype=dtype, device=self.device).clone())


@cache
def unusable_because(name: str) -> str:
    """Why a backend cannot run here; empty if it can. Registers the test-only one on first use."""
    if name == "cuda-on-cpu":
        try:
            from cuda_on_cpu.build import load

            fused_sched.backends.register(name, load())
        except ImportError as error:
            return f"the CUDA kernels could not be built for the CPU: {error}"
    if name == REFERENCE_ON_CUDA:
        return "" if torch.cuda.is_available() else "torch sees no CUDA device"
    usable, reason = fused_sched.backends.available(name)
    return "" if usable else reason


def leave_out(name: str, reason: str) -> NoReturn:
    """Skip the case, or fail it where it is wanted."""
    wanted = os.environ.get("FUSED_SCHED_REQUIRE_CUDA") or str(int(torch.cuda.is_available()))
    if wanted not in ("0", "1"):
        pytest.fail(f"FUSED_SCHED_REQUIRE_CUDA must be 0 or 1, got {wanted!r}", pytrace=False)
    if name in ON_CUDA and wanted == "1":
        remedy = "build it, or set FUSED_SCHED_REQUIRE_CUDA=0 to skip what needs it"
        pytest.fail(f"backend {name!r} must be usable here and is not: {reason}; {remedy}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def get_backend() -> Callable[[str], Backend]:
    """Looks a backend up by name, or leaves the test out with the reason it is not usable."""

    def get(name: str) -> Backend:
        reason = unusable_because(name)
        if reason:
            leave_out(name, reason)
        # With its index, as tensors have it: devices are keys.
        device = torch.device("cuda", torch.cuda.current_device()) if name in ON_CUDA else torch.device("cpu")
        return Backend("reference" if name == REFERENCE_ON_CUDA else name, device)

    return get


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, get_backend: Callable[[str], Backend]) -> Backend:
    return get_backend(request.param)


@pytest.fixture(params=[name for name in COMPILED if name != "cpu"])
def beside_cpu(request: pytest.FixtureRequest, get_backend: Callable[[str], Backend]) -> Backend:
    """The backends that must agree bit for bit with the compiled CPU one."""
    return get_backend(request.param)


@pytest.fixture(params=COMPILED)
def compiled(request: pytest.FixtureRequest, get_backend: Callable[[str], Backend]) -> Backend:
    """The backends that must agree bit for bit."""
    return get_backend(request.param)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone, for what asks whether there is one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
