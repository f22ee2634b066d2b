"""What tokens stand for, and texts spelled in tokens of exactly their bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tp_decoders.text.token_table import token_table
from tp_decoders.text.tokenizer import load_tokenizer

TOKENIZERS = Path(__file__).resolve().parents[2] / "data" / "tokenizers"
TEXTS = ("Hello, World", "㍿ ﾊﾟ 髙", "日本\n\t語", " <|endoftext|> ", "😀é\u0301", '{"なまえ": "はい"}')


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b", "gpt-neox-japanese"])
def test_a_text_is_spelled_by_tokens_of_its_own_bytes_none_of_them_special(name: str) -> None:
    tokenizer = load_tokenizer(TOKENIZERS / name)
    assert tokenizer is not None
    size = tokenizer.vocab_size + 40  # a padded vocabulary
    table = token_table(tokenizer, size, (3,))
    assert table is not None and len(table.pieces) == size and table.pieces[-1] == b""
    assert table.ends == (3,) and 3 in table.special_ids and tokenizer.special_ids <= table.special_ids
    for text in TEXTS:
        ids = table.spelled(text)
        assert b"".join(table.pieces[i] for i in ids) == text.encode(), text
        assert not table.special_ids & set(ids)
        own = tokenizer.encode(text, add_special_tokens=False)
        exact = b"".join(table.pieces[i] for i in own) == text.encode()
        assert ids == own or not exact or table.special_ids & set(own)
