"""Memory by counting: every storage that an operation makes, until it is gone."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations made and that are alive: now, and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs: Any = None):  # type: ignore[override]
        out = function(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and (key := each.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = each.untyped_storage().nbytes()
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(each.untyped_storage(), self.drop, key)
        return out

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
