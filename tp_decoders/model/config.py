"""What a decoder's shape is, whatever its family: the facts that loading, serving and training ask for.

A family's `from_hf` makes one from config.json. Options that only one family has live in its own frozen dataclass,
under `options`. Nothing here reads a file or knows Hugging Face's names for these facts, save `vocabulary` and
`dropouts` shared by several families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from parallel.errors import ConfigError
from parallel.matmul.activation import check_activation
from tp_decoders.files.json_fields import MOST, Fields
from tp_decoders.model.rotary_config import MOST_POSITIONS, RotaryConfig
from tp_decoders.model.task_config import TaskConfig

Positions = Literal["learned", "rotary", "alibi", "none"]
"""How a model knows where a token stands: a table beside the embeddings, heads that turn, scores that fall with the
distance, or not at all.
"""


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Probabilities of dropping an element, by where it stands."""

    embedding: float = 0.0
    attention: float = 0.0
    residual: float = 0.0
    head: float = 0.0

    @property
    def any(self) -> bool:
        return max(self.embedding, self.attention, self.residual, self.head) > 0


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One decoder. `rotary` is there where `positions` are rotary; `options` is its family's own dataclass; `hf` the
    config.json it came from.
    """

    model_type: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_model: int
    d_ff: int
    vocab_size: int
    max_positions: int
    positions: Positions
    activation: str
    norm_eps: float
    tie: bool
    rotary: RotaryConfig | None = None
    initializer_range: float = 0.02
    dropout: Dropout = Dropout()
    task: TaskConfig | None = None  # None: a language model
    options: Any = None
    hf: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert (self.rotary is None) == (self.positions != "rotary"), "rotary positions have settings, others none"

    @property
    def takes_positions(self) -> bool:
        """Whether positions may be said; else attention alone knows where tokens stand."""
        return self.positions in ("learned", "rotary")


def head_size(where: str, d_model: int, n_heads: int) -> int:
    """d_model / n_heads, which must be whole."""
    if d_model % n_heads:
        raise ConfigError(
            f"{where}: width {d_model} does not divide into {n_heads} heads; give a multiple of {n_heads}"
        )
    return d_model // n_heads


def check_sizes(config: DecoderConfig, where: str) -> DecoderConfig:
    """The config itself, if a machine can hold what follows from its numbers."""
    for name, value, most in (("d_ff", config.d_ff, MOST), ("the context", config.max_positions, MOST_POSITIONS)):
        if not 1 <= value <= most:
            raise ConfigError(f"{where}: {name} comes to {value}; it must be from 1 to {most}")
    return config


def probability(fields: Fields, key: str, default: float) -> float:
    """A dropout probability; null means none."""
    return 0.0 if fields.take(key, default) is None else fields.number(key, default, within=(0.0, 1.0))


def activation(fields: Fields, key: str, default: str) -> str:
    """The name of an activation that exists here."""
    name = fields.take(key, default)
    if not isinstance(name, str):
        raise fields.refuse(key, "a name of transformers' activations")
    return check_activation(name[:60])
