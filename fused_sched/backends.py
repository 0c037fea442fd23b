"""Which backends this installation has, and which one serves a device."""

from __future__ import annotations

import importlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import arena, codec, metric_rule, precision


@dataclass(frozen=True)
class Backend:
    """A way to run the step: compiled code for one type of device, or plain torch (`module` is None)."""

    name: str
    module: ModuleType | None
    device_type: str | None  # None: any
    #: Whether fp64 and narrower formats may meet in one tensor's parameter and gradient.
    mixes_fp64: bool = True

    def serves(self, device: torch.device) -> bool:
        return self.device_type is None or device.type == self.device_type


REFERENCE = Backend("reference", None, None)

_registered: dict[str, Backend] = {}
_unavailable: dict[str, str] = {}


def register(name: str, module: ModuleType, device_type: str = "cpu", mixes_fp64: bool = False) -> None:
    """Add a backend by its compiled module; its tables must agree with this package's names."""
    _check_tables(name, module)
    _registered[name] = Backend(name, module, device_type, mixes_fp64)


def available(name: str) -> tuple[bool, str]:
    """Whether a backend can be used here, and why not."""
    if name == "reference":
        return True, "plain torch operations"
    if name not in _registered:
        return False, _unavailable.get(name, "not built")
    if name == "cuda":
        if not torch.cuda.is_available():
            return False, "torch sees no CUDA device"
        module = _registered[name].module
        assert module is not None
        try:
            module.device_count()
        except RuntimeError as error:
            return False, str(error)
    return True, "built"


def select(name: str, device: torch.device) -> Backend:
    """The backend that runs parameters on this device.

    Raises ValueError for an unknown name, RuntimeError if the named backend is missing or serves other devices.
    """
    if name == "auto":
        for candidate in ("cpu", "cuda"):
            backend = _registered.get(candidate)
            if backend is not None and backend.serves(device) and available(candidate)[0]:
                return backend
        _warn_of_reference(device)
        return REFERENCE
    check_name(name)
    usable, reason = available(name)
    if not usable:
        raise RuntimeError(f"backend={name!r} cannot be used here: {reason}; use backend='auto'")
    backend = REFERENCE if name == "reference" else _registered[name]
    if not backend.serves(device):
        raise RuntimeError(
            f"backend={name!r} serves {backend.device_type} parameters, got one on {device}; use backend='auto'"
        )
    return backend


def check_name(name: object) -> None:
    """Raise ValueError unless this is the name of a backend, built or not."""
    known = ("auto", "cuda", "cpu", "reference", *(n for n in _registered if n not in ("cuda", "cpu")))
    if name not in known:
        raise ValueError(f"backend must be one of {', '.join(map(repr, known))}, got {name!r}")


def _check_tables(name: str, module: ModuleType) -> None:
    expected = {
        "FORMATS": set(precision.FORMATS.values()),
        "MASTERS": set(codec.MASTERS),
        "MOMENTS": set(codec.MOMENTS),
    }
    for table, names in expected.items():
        built = set(getattr(module, table))
        if built != names:
            raise ImportError(
                f"fused_sched backend {name!r} and this package disagree on {table}: built {sorted(built)}, "
                f"expected {sorted(names)}; rebuild the package"
            )
    metric_rule.check_module(module)
    kept = {name: sum(s.dtype.itemsize for s in streams) for name, streams in codec.MASTERS.items()}
    coded = {
        name: (streams[0].dtype.itemsize, codec.GROUP * (len(streams) > 2)) for name, streams in codec.MOMENTS.items()
    }
    if (kept, coded) != (module.MASTER_BYTES, module.MOMENT_BYTES):
        raise ImportError(f"fused_sched backend {name!r} keeps other bytes per element; rebuild the package")
    record_bytes, record_fields = module.LAYOUTS["step_record"]
    offsets = {field: offset for field, _, offset in record_fields}
    same_record = record_bytes == arena.STEP_RECORD_BYTES and offsets == arena.STEP_RECORD_OFFSETS
    if tuple(module.SLOTS) != arena.SLOTS or module.PADDING != arena.PADDING or not same_record:
        raise ImportError(f"fused_sched backend {name!r} has another layout of state; rebuild the package")


def _warn_of_reference(device: torch.device) -> None:
    """pip does not show what a build says, so a slow installation would go unnoticed."""
    if device.type in ("cpu", "cuda") and device.type not in _warned:
        _warned.add(device.type)
        reason = available(device.type)[1]
        warnings.warn(
            f"parameters on {device} are updated by the slow 'reference' backend, because backend "
            f"{device.type!r} is missing ({reason}); install a compiler and reinstall fused_sched, or pass "
            "backend='reference' to choose it",
            RuntimeWarning,
            stacklevel=2,
        )


_warned: set[str] = set()


def build_info() -> dict[str, Any]:
    """What the build wrote about itself; empty for a checkout that was never built."""
    try:
        info: dict[str, Any] = json.loads(Path(__file__).with_name("_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info


def _load() -> None:
    for name, device_type in (("cpu", "cpu"), ("cuda", "cuda")):
        try:
            module = importlib.import_module(f"fused_sched._{name}")
        except ModuleNotFoundError:
            _unavailable[name] = (
                f"not built: {build_info().get('not_built', {}).get(f'_{name}', 'run make build, or pip install .')}"
            )
        except ImportError as error:
            _unavailable[name] = str(error)
        else:
            register(name, module, device_type, mixes_fp64=name == "cpu")


_load()
