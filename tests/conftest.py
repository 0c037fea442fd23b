"""The four backends as fixtures. A case that needs a GPU carries the marker `cuda` and skips without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

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
    usable, reason = fused_sched.backends.available(name)
    return "" if usable else reason


@pytest.fixture(scope="session")
def get_backend() -> Callable[[str], Backend]:
    """Looks a backend up by name, or skips the test with the reason it is not usable."""

    def get(name: str) -> Backend:
        reason = unusable_because(name)
        if reason:
            pytest.skip(reason)
        return Backend(name, torch.device("cuda" if name == "cuda" else "cpu"))

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
