"""Sequence parallelism: between the sharded layers, activations are divided by tokens.

A flat row of T tokens is cut into virtual shards like any other axis; a rank keeps its run of them. Column-
parallel layers gather the tokens on entry (and again in the backward, so that only the local ones are kept), row-
parallel sums are cut back on exit:

    gather_tokens    forward: concatenate tokens      backward: the rank's own tokens
    scatter_tokens   forward: the rank's own tokens   backward: concatenate tokens

Every value is the one that the undivided computation has, bit for bit: dividing tokens moves rows, it adds nothing
up anew. What is summed over tokens outside the sharded layers (the gains of layer norms) is summed in the tree
over token shards, divided or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.ranks.collectives import gather_from, scatter_to
from parallel.ranks.group import Group
from parallel.sharding.rules import VirtualShards


def token_shards(num_tokens: int, group: Group) -> VirtualShards | None:
    """How this forward's tokens are divided; None where they are not (one rank, not asked for, or nothing kept for a
    backward).
    """
    if not group.sequence_parallel or group.size == 1 or not torch.is_grad_enabled():
        return None
    return group.shards(num_tokens)


def gather_tokens(x_TD: Tensor, group: Group, tokens: VirtualShards | None) -> Tensor:
    return x_TD if tokens is None else gather_from(x_TD, group, tokens.sizes, 0)


def scatter_tokens(x_TD: Tensor, group: Group, tokens: VirtualShards | None) -> Tensor:
    return x_TD if tokens is None else scatter_to(x_TD, group, tokens.sizes, 0)


def own_tokens(x_TD: Tensor, group: Group, tokens: VirtualShards) -> Tensor:
    start, stop = tokens.range(group.rank)
    return x_TD[start:stop].contiguous()


def all_tokens(x_TD: Tensor, group: Group, tokens: VirtualShards) -> Tensor:
    return group.talk.all_gather(x_TD.contiguous(), tokens.sizes, 0)
