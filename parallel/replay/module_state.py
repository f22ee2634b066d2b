"""Whether a module is still what it was: the same modules and parameters in the same places, none written to since.

A recorded program holds addresses of weights, and of what was derived from them. It is right as long as this is.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from parallel.sharding.parameter import Stamp, Weight, stamp


class ModuleState:
    """Of a module and all in it, as they were found. Of parameters whose writes nobody counts only where they lie is
    known: kernels read such vectors where they are, and nothing may be derived from such a matrix (`countable`).
    """

    def __init__(self, module: nn.Module) -> None:
        self._tables: list[dict[str, Any]] = [
            table for each in module.modules() for table in (each._parameters, each._modules, each._buffers)
        ]
        self._members = [member for table in self._tables for member in table.values()]  # kept: no id comes twice
        self._ids = [*map(id, self._members)]
        parameters = list(module.parameters())
        self._counted = [p for p in parameters if isinstance(p, Weight)]
        self._plain = [p for p in parameters if not isinstance(p, Weight)]
        self._stamps, self._places = self._now()
        self.countable = all(p.dim() < 2 for p in self._plain) and self.holds()

    def holds(self) -> bool:
        """Whether nothing has changed."""
        ids = [id(member) for table in self._tables for member in table.values()]
        return ids == self._ids and self._now() == (self._stamps, self._places)

    def _now(self) -> tuple[list[Stamp], list[int]]:
        return [stamp(p) for p in self._counted], [p.data_ptr() for p in self._plain]
