"""Tokenizing a corpus: what is written, that an interruption leaves no trace in it, and what is refused."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from cluster.training.data.corpus.document import DataError, Source
from cluster.training.data.corpus.sources import SourceOptions, open_source
from cluster.training.data.store.token_store import TokenStore
from cluster.training.data.store.tokenize_corpus import TokenizeProgress, tokenize_corpus
from cluster.training.data.store.tokenizer_fingerprint import tokenizer_fingerprint
from parallel.errors import ConfigError
from tests.cluster.training.data.made_corpora import EOS, ByteTokenizer, random_texts, store_of, write_jsonl


def corpus(folder: Path, files: int = 3, texts: int = 40) -> Source:
    folder.mkdir(exist_ok=True)
    for number in range(files):
        rows = [{"text": text} for text in random_texts(texts, 60, seed=number)]
        write_jsonl(folder / f"{number}.jsonl", [*rows, {"text": " \n"}])
    return open_source(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Interrupted(Exception):
    pass


class FailingTokenizer(ByteTokenizer):
    """Stops after some texts: by an exception, or as a killed process does."""

    def __init__(self, after: int, kill: bool = False) -> None:
        super().__init__()
        self.after, self.kill = after, kill

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = super().encode(text)
        if self.calls > self.after:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Interrupted
        return ids


def test_tokens_are_the_documents_each_with_an_end(tmp_path: Path) -> None:
    store = store_of(tmp_path, ["ab", "", "二", "  \n ", "c"])
    assert store.tokens.tolist() == [97, 98, EOS, *"二".encode(), EOS, 99, EOS]
    assert store.starts.tolist() == [0, 3, 7, 9]
    assert store.tokens.dtype == np.uint16
    assert store.meta["counts"] == {"documents": 3, "tokens": 9, "empty_documents": 2}


def test_an_end_that_the_tokenizer_adds_is_not_doubled(tmp_path: Path) -> None:
    class Ending(ByteTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [*super().encode(text), *([EOS] if add_special_tokens else [])]

    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "ab", "prompt": "x"}])
    store = tokenize_corpus(open_source(path, SourceOptions(prompt_field="prompt")), Ending(), tmp_path / "tokens")
    assert store.tokens.tolist() == [120, 97, 98, EOS]
    assert store.prompts is not None and store.prompts.tolist() == [1]


def test_what_begins_every_text_is_not_put_between_a_prompt_and_its_answer(tmp_path: Path) -> None:
    class Beginning(ByteTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [*([1] if add_special_tokens else []), *super().encode(text)]

    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "ab", "prompt": "x"}, {"text": "c", "prompt": ""}])
    store = tokenize_corpus(open_source(path, SourceOptions(prompt_field="prompt")), Beginning(), tmp_path / "tokens")
    assert store.tokens.tolist() == [1, 120, 97, 98, EOS, 1, 99, EOS]


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}])
    assert tokenize_corpus(open_source(path), ByteTokenizer(1 << 16), tmp_path / "small").tokens.dtype == np.uint16
    store = tokenize_corpus(open_source(path), ByteTokenizer((1 << 16) + 1), tmp_path / "large")
    assert store.tokens.dtype == np.uint32 and store.tokens.tolist() == [97, 98, EOS]


def test_meta_records_sources_and_tokenizer_but_not_where_they_lie(tmp_path: Path) -> None:
    source = corpus(tmp_path / "corpus")
    store = tokenize_corpus(source, ByteTokenizer(), tmp_path / "tokens")
    assert [entry["name"] for entry in store.meta["sources"]] == ["0.jsonl", "1.jsonl", "2.jsonl"]
    assert store.meta["sources"][0]["bytes"] == (tmp_path / "corpus/0.jsonl").stat().st_size
    assert store.tokenizer_fingerprint == tokenizer_fingerprint(ByteTokenizer())
    assert str(tmp_path) not in json.dumps(store.meta)


@pytest.mark.parametrize("seed", range(4))
def test_interrupted_and_restarted_at_random_it_writes_the_same_bytes(tmp_path: Path, seed: int) -> None:
    source, rng = corpus(tmp_path / "corpus"), random.Random(seed)
    tokenize_corpus(source, ByteTokenizer(), tmp_path / "whole")
    interruptions = 0
    while not (tmp_path / "pieces").exists():
        tokenizer = FailingTokenizer(after=rng.randrange(10, 50))
        try:
            tokenize_corpus(source, tokenizer, tmp_path / "pieces", checkpoint_tokens=rng.choice([50, 200, 700]))
        except Interrupted:
            interruptions += 1
            assert interruptions < 100, "restarts get nowhere"
    assert interruptions >= 2, "the corpus was done before it could be interrupted"
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
    assert not (tmp_path / "pieces.partial").exists()


def test_killed_processes_leave_only_what_the_next_one_goes_on_from(tmp_path: Path) -> None:
    source = corpus(tmp_path / "corpus")
    tokenize_corpus(source, ByteTokenizer(), tmp_path / "whole")
    for after in (20, 35, 60):
        child = os.fork()
        if child == 0:
            tokenize_corpus(source, FailingTokenizer(after, kill=True), tmp_path / "pieces", checkpoint_tokens=200)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        with (tmp_path / "pieces.partial" / "tokens.bin").open("ab") as stream:
            stream.write(b"written but never confirmed")
    last = ByteTokenizer()
    tokenize_corpus(source, last, tmp_path / "pieces")
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
    assert last.calls < 100, "the last run began anew"


def test_an_interrupted_run_of_another_corpus_is_not_continued(tmp_path: Path) -> None:
    source = corpus(tmp_path / "corpus")
    with pytest.raises(Interrupted):
        tokenize_corpus(source, FailingTokenizer(60), tmp_path / "tokens", checkpoint_tokens=100)
    path = tmp_path / "corpus/0.jsonl"
    path.write_text(path.read_text().replace("a", "b"))
    tokenize_corpus(source, ByteTokenizer(), tmp_path / "tokens")
    tokenize_corpus(source, ByteTokenizer(), tmp_path / "other")
    assert contents(tmp_path / "tokens") == contents(tmp_path / "other")


def test_a_finished_folder_is_opened_again_and_never_overwritten(tmp_path: Path) -> None:
    source = corpus(tmp_path / "corpus")
    tokenize_corpus(source, ByteTokenizer(), tmp_path / "tokens")
    before = contents(tmp_path / "tokens")
    again = FailingTokenizer(after=10)  # enough for its fingerprint, not for the corpus
    assert isinstance(tokenize_corpus(source, again, tmp_path / "tokens"), TokenStore)
    with pytest.raises(ConfigError, match="another run .its tokenizer differ"):
        tokenize_corpus(source, ByteTokenizer(shift=1), tmp_path / "tokens")
    corpus(tmp_path / "corpus", texts=41)
    with pytest.raises(ConfigError, match="another run .its sources differ"):
        tokenize_corpus(source, ByteTokenizer(), tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="mine is in use and holds no tokens"):
        tokenize_corpus(source, ByteTokenizer(), tmp_path / "mine")


def test_two_processes_do_not_write_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "tokens.partial").mkdir()
    with (tmp_path / "tokens.partial" / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing"):
            tokenize_corpus(corpus(tmp_path / "corpus"), ByteTokenizer(), tmp_path / "tokens")


def test_progress_grows_to_the_whole_corpus(tmp_path: Path) -> None:
    seen: list[TokenizeProgress] = []
    source = corpus(tmp_path / "corpus")
    store = tokenize_corpus(source, ByteTokenizer(), tmp_path / "tokens", progress=seen.append, checkpoint_tokens=300)
    total = sum(file.path.stat().st_size for file in source.files)
    assert len(seen) > 6 and [p.bytes_done for p in seen] == sorted(p.bytes_done for p in seen)
    last = TokenizeProgress(3, 3, total, total, store.num_documents, store.num_tokens)
    assert seen[-1] == last and 0 < seen[0].bytes_done < total // 3


def test_how_far_it_is_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cluster.training.data.store.tokenize_corpus")
    store = tokenize_corpus(corpus(tmp_path / "corpus"), ByteTokenizer(), tmp_path / "tokens", checkpoint_tokens=300)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[-1] == f"tokenized 100 % of the corpus: {store.num_documents} documents, {store.num_tokens} tokens"
    assert len(lines) > 6


def test_a_full_disk_says_so_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus(tmp_path / "corpus")
    tokenize_corpus(source, ByteTokenizer(), tmp_path / "whole")
    real, count = os.fsync, iter(range(100))

    def fsync(descriptor: int) -> None:
        if next(count) >= 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DataError, match="tokens stopped: .*No space left on device.*goes on from there"):
            tokenize_corpus(source, ByteTokenizer(), tmp_path / "tokens", checkpoint_tokens=300)
    tokenize_corpus(source, ByteTokenizer(), tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


def test_what_no_tokens_can_be_made_of_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": "é"}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the tokenizer gave id 195, outside its vocabulary of 180"):

        class Small(ByteTokenizer):
            eos_token_id = 0  # type: ignore[assignment]

            def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
                return super().encode(text) if text in ("fine", "é") else [1]

        tokenize_corpus(open_source(path), Small(180), tmp_path / "tokens")
    with pytest.raises(ConfigError, match="end-of-sequence id is 256"):
        tokenize_corpus(open_source(path), ByteTokenizer(256), tmp_path / "tokens")
    (tmp_path / "b.jsonl").write_text('{"text": "a\\ud800"}')
    with pytest.raises(DataError, match=r"b\.jsonl, line 1 has a lone surrogate"):
        tokenize_corpus(open_source(tmp_path / "b.jsonl"), ByteTokenizer(), tmp_path / "other")
    empty = write_jsonl(tmp_path / "c.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match=r"c\.jsonl .*no text \(1 empty documents\)"):
        tokenize_corpus(open_source(empty), ByteTokenizer(), tmp_path / "none")


def test_fingerprints_tell_tokenizers_apart() -> None:
    different = [ByteTokenizer(), ByteTokenizer(shift=1), ByteTokenizer(258)]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in different}) == 3
    assert tokenizer_fingerprint(ByteTokenizer()) == tokenizer_fingerprint(ByteTokenizer())


def test_the_fingerprint_of_a_given_tokenizer_is_pinned() -> None:
    """A change of the probe text would make every stored folder of tokens look like another tokenizer's."""
    assert tokenizer_fingerprint(ByteTokenizer()) == "484f73bbcf8e4ab0e44c450f6e8a4a73"
