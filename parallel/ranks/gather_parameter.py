"""A divided parameter put together: on rank 0, to be written, or on every rank, to be divided anew."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.ranks.group import Group
from parallel.sharding.released_weight import values
from parallel.sharding.rules import Replicated, full_shape_of, rule_of


@torch.no_grad()
def full_tensor(parameter: Tensor, group: Group) -> Tensor | None:
    """The parameter put together on rank 0, None elsewhere. One gather, none where every rank holds it whole."""
    rule = rule_of(parameter)
    if group.size == 1:
        return values(parameter)
    if isinstance(rule, Replicated):
        return values(parameter) if group.rank == 0 else None
    sizes = [rule.local_shape(full_shape_of(parameter), rank)[rule.dim] for rank in range(group.size)]
    gathered = group.talk.gather(values(parameter), sizes, rule.dim)
    return None if gathered is None else rule.join(gathered.split(sizes, rule.dim))


@torch.no_grad()
def whole_tensor(parameter: Tensor, group: Group) -> Tensor:
    """The parameter put together on every rank. One gather, none where every rank holds it whole."""
    rule = rule_of(parameter)
    if group.size == 1 or isinstance(rule, Replicated):
        return values(parameter)
    sizes = [rule.local_shape(full_shape_of(parameter), rank)[rule.dim] for rank in range(group.size)]
    return rule.join(group.talk.all_gather(values(parameter).contiguous(), sizes, rule.dim).split(sizes, rule.dim))
