"""Where and in which type a module's parameters are made, as every module takes it."""

from __future__ import annotations

from typing import TypedDict

import torch


class Place(TypedDict):
    """Where and in which type a module's parameters are made."""

    dtype: torch.dtype | None
    device: torch.device | str | None
