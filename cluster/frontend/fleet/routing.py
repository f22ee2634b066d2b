"""Which replica a prompt goes to: where most of its beginning was sent before, unless there is much more to do there.

The longest run of whole blocks of tokens that a replica was already given is looked up by chained hashes, of which
each replica remembers a bounded number, the longest unused first to go. A hash that two runs share costs time, never
a changed answer: the replica's own cache compares tokens. Knows no request and no engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.frontend.requests.call import RoutingConfig


@dataclass
class Sent:
    """What one replica was given."""

    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)  # chained hashes, the longest unused first
    by_prefix: int = 0  # prompts that came because their beginning was known
    by_load: int = 0  # prompts that came because there was the least to do


class Router:
    """Chooses among replicas by their numbers; remembers what it chose."""

    def __init__(self, num_replicas: int, config: RoutingConfig | None = None) -> None:
        self._config = config or RoutingConfig()
        self.sent = [Sent() for _ in range(num_replicas)]

    def choose(self, tokens: Sequence[int], outstanding: Mapping[int, int]) -> int:
        """One of the replicas for whom it is said how many tokens are outstanding there."""
        if len(self.sent) == 1:  # nothing to choose, nothing to remember
            self.sent[0].by_load += 1
            return 0
        chains = tuple(self._chains(tokens))
        known = {index: self._num_known(index, chains) for index in outstanding}
        least = min(outstanding.values())
        near = [i for i in outstanding if known[i] and outstanding[i] - least <= self._config.slack_tokens]
        if near:
            chosen = max(near, key=lambda i: (known[i], -outstanding[i], -i))
            self.sent[chosen].by_prefix += 1
        else:  # among those with as little to do, the one that has seen the least: caches fill evenly
            chosen = min(outstanding, key=lambda i: (outstanding[i], len(self.sent[i].blocks), i))
            self.sent[chosen].by_load += 1
        self._remember(chosen, chains)
        return chosen

    def forget(self, replica: int) -> None:
        """Its cache is empty now."""
        self.sent[replica].blocks.clear()

    def _chains(self, tokens: Sequence[int]) -> Iterator[int]:
        """A hash of each whole block and all before it."""
        chain, size = 0, self._config.block_tokens
        for start in range(0, len(tokens) - size + 1, size):
            chain = hash((chain, tuple(tokens[start : start + size])))
            yield chain

    def _num_known(self, replica: int, chains: Sequence[int]) -> int:
        blocks = self.sent[replica].blocks
        return next((count for count, chain in enumerate(chains) if chain not in blocks), len(chains))

    def _remember(self, replica: int, chains: Sequence[int]) -> None:
        """The end of a prompt first, so that beginnings are kept the longest."""
        blocks = self.sent[replica].blocks
        for chain in reversed(chains[: self._config.max_blocks]):
            blocks[chain] = None
            blocks.move_to_end(chain)
        while len(blocks) > self._config.max_blocks:
            blocks.popitem(last=False)
