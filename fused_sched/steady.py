"""The steady step: a call like the last one, recognised by one compiled pass over its tensors.

The pass (`csrc/tensor_watch.h`) reads what tensors look like and where they are, in some 0.2 us per parameter. Whenever
it is not sure, and where torch is older than 2.10 and has no DLPack exchange API, the checks of `packing.py` decide,
which take twenty times as long and know every error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .arena import Entry

if TYPE_CHECKING:
    from .devices import Call
    from .hyperparameters import GroupSettings

#: torch's, through which compiled code reads tensors.
_EXCHANGE_API: Any = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


class SteadyCall:
    """A call for which everything is prepared, and whether the next one repeats it."""

    def __init__(self, call: Call) -> None:
        self.call = call._replace(grads=[])  # which zero_grad() means to free
        self.ids = frozenset(map(id, call.owners))
        self.settings: list[GroupSettings] = []  # that the devices have
        self.reducer: Callable[[torch.Tensor], object] | None = None  # of the sum of squares
        self._watch: Any = None
        self._groups: list[dict[str, Any]] = []

    def watch(self, module: Any, groups: Sequence[dict[str, Any]], rows: Sequence[int]) -> bool:
        """Remember the tensors as they are; False if they are not all plain ones, and repeats cannot be recognised.

        rows: for each parameter of the groups the address of its row of a tensor table, 0 for one without gradient.
        """
        if _EXCHANGE_API is None or module is None:
            return False
        # The watch compares addresses: what must not be freed under them is held here, where the garbage collector
        # sees it.
        self._groups = list(groups)
        self._watch = module.TensorWatch(_EXCHANGE_API, torch.Tensor, torch.nn.Parameter, torch.Tensor.is_neg)
        known: bool = self._watch.remember(self._groups, rows)
        return known

    def add_state(self, entries: Iterable[Entry]) -> None:
        """Watch the state of these entries, too: somebody was shown their tensors and may set their `.data`."""
        for entry in entries:
            for tensor, address in zip(entry.tensors.values(), entry.pointers, strict=True):
                self._watch.add_state(tensor, address)

    def repeats(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether a call with these groups is this one again; the table then has its gradients' addresses.

        The gradients are then held until `release()`.
        """
        repeated: bool = self._watch.repeats(groups)
        return repeated

    def release(self) -> None:
        """The step is over."""
        self._watch.release()
