"""`tp-decoders generate` against a server: text where it has some, ids where it has none, in one call."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.frontend.output.output_text import TextCodec
from cluster.rpc.client.client import AsyncClient
from launch.main import main as tp_decoders
from tests.cluster.frontend.fakes import CODEC, PIECES, tokens_of
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.harness import service

TOKENS = tokens_of([0, 1], 1, 0, 5)


@pytest.mark.parametrize(
    ("codec", "words", "wanted"),
    [
        (None, [], " ".join(map(str, TOKENS))),
        (CODEC, ["--ids"], " ".join(map(str, TOKENS))),
        (CODEC, [], b"".join(PIECES[token] for token in TOKENS).decode("utf-8", "replace").strip()),
    ],
)
def test_a_prompt_of_ids_is_one_call_and_its_answer_is_text_where_there_is_a_tokenizer(
    codec: TextCodec | None,
    words: list[str],
    wanted: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    call = AsyncClient.call

    async def main() -> None:
        async with service(codec=codec) as s:
            argv = ["generate", "--address", s.address, "--token-ids", "0,1", "--max-new-tokens", "5", "--seed", "1"]

            async def counted(self: AsyncClient, method: Any, *args: Any) -> Any:
                called.append(str(method))
                return await call(self, method, *args)

            monkeypatch.setattr(AsyncClient, "call", counted)
            assert await asyncio.to_thread(tp_decoders, [*argv, *words]) == 0

    run(main())
    assert capsys.readouterr().out.strip() == wanted and not called
