"""Cross-attention of a block: queries of the decoder's tokens against keys and values of an encoder's states.

Sharded by heads like self-attention: q and kv column-parallel, out row-parallel, one reduction in the forward and two
in the backward (the tokens' and the encoder states' gradients). Whether a pass has encoder states is said by its
`encoder`; without them the block leaves this out. T tokens, S encoder states, D model, N local heads, H head.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from parallel.attention.attend import AttentionSpec
from parallel.attention.forward_pass import Pass
from parallel.attention.heads import HeadLayout
from parallel.layers.dropout import CROSS_ATTENDED, DropoutSite
from parallel.layers.linear import ColumnLinear, RowLinear
from parallel.layers.norm import LayerNorm
from parallel.ranks.group import Group
from parallel.sharding.rules import Part
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.place import Place

Rows = Literal["blocks", "heads"]
"""How the rows of kv lie: all keys, then all values; or a head's key and value, head after head."""


class CrossAttention(nn.Module):
    """dropout(attention(norm x, encoder states)); `scale` multiplies its scores."""

    def __init__(self, config: DecoderConfig, layer: int, scale: float, rows: Rows, group: Group, place: Place) -> None:
        super().__init__()
        d, p = config.d_model, config.dropout
        layout = HeadLayout.of(group, config.n_heads, config.n_kv_heads, config.head_dim)
        heads = layout.head_shards
        self.spec = AttentionSpec(layer, scale, None, p.attention, layout.local_ids)
        self.heads, self.by_head = (layout.n_local, config.head_dim), rows == "heads"
        self.norm = LayerNorm(d, config.norm_eps, group=group, **place)
        self.q = ColumnLinear(d, heads, group=group, **place)
        self.kv = ColumnLinear(d, heads.scaled(2) if self.by_head else (Part(d, heads),) * 2, group=group, **place)
        self.out = RowLinear(heads, d, group=group, **place)
        self.drop = DropoutSite(p.residual, layer, CROSS_ATTENDED, group)

    def forward(self, x_TD: Tensor, now: Pass) -> Tensor:
        """What the block adds."""
        q_TNH = self.q(self.norm(x_TD, now), now).unflatten(1, self.heads)
        o_TNH = now.cross_attended(self.spec, q_TNH, self.keys_values)
        return self.drop(self.out(o_TNH.flatten(1), now), now)

    def keys_values(self, states_SD: Tensor) -> tuple[Tensor, Tensor]:
        """[S, N, H] each."""
        n_local, head_dim = self.heads
        if self.by_head:
            k_SNH, v_SNH = self.kv(states_SD).unflatten(1, (n_local, 2, head_dim)).unbind(2)
        else:
            k_SNH, v_SNH = self.kv(states_SD).unflatten(1, (2, n_local, head_dim)).unbind(1)
        return k_SNH, v_SNH
