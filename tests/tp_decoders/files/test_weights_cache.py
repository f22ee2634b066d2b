"""Each byte of a checkpoint is read once per host: counted by the kernel over the processes of two replicas of two
ranks each, with a cache and without. And what a cache does when things go wrong.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.errors import CheckpointError
from parallel.ranks.group import Group
from tests.tp_decoders.checkpoint.load_memory import Sampler
from tests.tp_decoders.families.parity import GPT2, hf
from tp_decoders import load
from tp_decoders.files import weights_cache
from tp_decoders.files.weights_cache import WeightsCache

RANKS = 4  # dp 2 x tp 2
STALL_S = 180.0
SMALL_READS = 1 << 18
"""Of one process: config.json, the index, notes, what Python itself reads."""


def counters() -> tuple[int, int]:
    """Of this thread: bytes asked for by read calls (mapped files not among them), and fetched from a disk for it."""
    lines = dict(line.split(": ") for line in Path("/proc/thread-self/io").read_text().splitlines())
    return int(lines["rchar"]), int(lines["read_bytes"])


def load_one(group: Group, folder: Path, cache_folder: Path | None) -> dict[str, Any]:
    """One rank of two replicas of two."""
    torch.set_num_threads(1)
    own = Group(group.rank % 2, 2)
    sampler, seen = Sampler(), []
    before = sampler.now()
    cache = WeightsCache(cache_folder, lambda *_: seen.append(sampler.now()), STALL_S) if cache_folder else None
    chars, disk = counters()
    model = load(folder, group=own, cache=cache, progress=lambda *_: seen.append(sampler.now()))
    after = counters()
    return {
        "chars": after[0] - chars, "disk": after[1] - disk, "anonymous": max(seen) - before,
        "shard": sum(p.nbytes for p in model.parameters()), "fetched": cache.fetched if cache else 0,
        "digest": hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 25 MB in several files, whose row-parallel slices share pages."""
    folder = tmp_path_factory.mktemp("big")
    model = hf("GPT2", GPT2, n_embd=256, n_layer=4, n_head=8, vocab_size=12000)()
    model.save_pretrained(folder, max_shard_size="6MB")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    hf("GPT2", GPT2)().save_pretrained(folder)
    return folder


def size_of(folder: Path) -> int:
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 3
    return sum(path.stat().st_size for path in files)


def test_with_a_cache_two_replicas_of_two_ranks_read_each_byte_of_the_source_once(
    ranks: Any, big: Path, tiny: Path, tmp_path: Path
) -> None:
    ranks(RANKS, load_one, tiny, None)  # whatever is imported late
    size = size_of(big)
    first = ranks(RANKS, load_one, big, tmp_path)
    assert sum(seen["fetched"] for seen in first) == size
    chars = sum(seen["chars"] for seen in first)
    assert size <= chars <= size + RANKS * SMALL_READS, "by the kernel's count of all read calls"
    again = ranks(RANKS, load_one, big, tmp_path)
    assert sum(seen["chars"] for seen in again) <= RANKS * SMALL_READS and not any(s["fetched"] for s in again)
    for seen in (*first, *again):
        assert seen["anonymous"] <= 1.1 * seen["shard"] + weights_cache.CHUNK, "copies are files, not memory"
    assert [seen["digest"] for seen in first] == [seen["digest"] for seen in again]
    assert first[0]["digest"] == first[2]["digest"] != first[1]["digest"]
    home = next(tmp_path.iterdir())
    assert not list(home.glob("*.part"))
    (digest,) = {seen["digest"] for seen in ranks(1, load_one, big, None)}
    assert digest == first[0]["digest"], "the copies give the source's weights"


def evict(folder: Path) -> None:
    """Out of the kernel's memory, so that it has to be read from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_without_a_cache_the_processes_of_a_host_share_what_the_disk_gave(ranks: Any, big: Path) -> None:
    size = size_of(big)
    evict(big)
    (alone,) = ranks(1, load_one, big, None)
    if alone["disk"] < size / 4:
        pytest.skip("the kernel does not count what this file system reads, or does not forget it")
    evict(big)
    together = sum(seen["disk"] for seen in ranks(RANKS, load_one, big, None))
    assert together < 1.5 * size, f"{RANKS} processes fetched {together / size:.2f} times the files"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(os.urandom(3 * weights_cache.CHUNK // 2))
    return folder


def fetch(source: Path, folder: Path, stall_s: float = 60.0) -> tuple[int, list[bool]]:
    """How much was read from the source, and which files are read from copies, which are the source's."""
    cache = WeightsCache(folder, stall_s=stall_s)
    local = cache.local(sorted(source.iterdir()))
    assert all(path.read_bytes() == copy.read_bytes() for path, copy in local.items())
    return cache.fetched, [copy != path for path, copy in local.items()]


def test_a_copy_is_made_again_when_its_source_changed_and_only_then(source: Path, tmp_path: Path) -> None:
    size = (source / "a.safetensors").stat().st_size
    assert fetch(source, tmp_path / "cache") == (2 * size, [True, True])
    assert fetch(source, tmp_path / "cache") == (0, [True, True])
    (source / "a.safetensors").write_bytes(os.urandom(size))
    assert fetch(source, tmp_path / "cache") == (size, [True, True])
    (source / "b.safetensors").unlink()
    assert fetch(source, tmp_path / "cache") == (0, [True])
    assert not list((tmp_path / "cache").rglob("b.safetensors*")), "what the source has no more is removed"


def test_folders_of_links_into_one_store_have_copies_of_their_own(source: Path, tmp_path: Path) -> None:
    size = (source / "a.safetensors").stat().st_size
    for revision, file in (("first", "a.safetensors"), ("second", "b.safetensors")):
        (tmp_path / revision).mkdir()
        (tmp_path / revision / "model.safetensors").symlink_to(source / file)
    for expected in (size, 0):
        for revision in ("first", "second"):
            assert fetch(tmp_path / revision, tmp_path / "cache") == (expected, [True])


def test_after_a_boot_or_a_change_a_copy_is_compared_with_its_checksum(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = (source / "a.safetensors").stat().st_size
    fetch(source, tmp_path / "cache")
    monkeypatch.setattr(weights_cache, "boot", lambda: "a later one")
    assert fetch(source, tmp_path / "cache") == (0, [True, True]), "compared, and found good"
    copy = next((tmp_path / "cache").rglob("a.safetensors"))
    with copy.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    assert fetch(source, tmp_path / "cache") == (size, [True, True])
    assert "a.safetensors is not what was written there: its checksum differs" in caplog.text


def test_a_draft_of_a_killed_process_is_made_again_and_one_of_a_hanging_process_is_not_waited_for(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetch(source, tmp_path / "cache")
    copy = next((tmp_path / "cache").rglob("a.safetensors"))
    copy.with_name("a.safetensors.note").unlink()
    copy.rename(copy.with_name("a.safetensors.part"))
    with copy.with_name("a.safetensors.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with caplog.at_level(logging.WARNING):
            assert fetch(source, tmp_path / "cache", stall_s=0.3) == (0, [False, True])
        assert "another process copies a.safetensors and got no further within 0.3 s" in caplog.text
    size = (source / "a.safetensors").stat().st_size
    assert fetch(source, tmp_path / "cache") == (size, [True, True]), "the lock ended with its holder"


def test_without_room_the_source_is_read_and_that_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weights_cache, "SPARE", 1 << 60)
    assert fetch(source, tmp_path / "cache") == (0, [False, False])
    assert "to spare are needed" in caplog.text and "they are read from their source" in caplog.text
    (tmp_path / "a file").write_text("")
    assert fetch(source, tmp_path / "a file") == (0, [False, False])


def test_a_source_that_changes_while_it_is_copied_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = WeightsCache(tmp_path / "cache", lambda what, done, total: os.utime(source / "a.safetensors"))
    with pytest.raises(CheckpointError, match=r"a.safetensors changed while it was copied; start again"):
        cache.local([source / "a.safetensors"])
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_damaged_checkpoint_is_named_by_its_source_and_progress_ends_with_all_bytes(
    tiny: Path, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    cache = WeightsCache(tmp_path / "cache", lambda *line: told.append(line))
    model = load(tiny, cache=cache, progress=lambda *line: told.append(line))
    assert {what for what, _, _ in told} == {"copying weights to this host", "reading weights"}
    assert told[-1][1] == told[-1][2] == sum(p.numel() for p in model.parameters()) * torch.float32.itemsize
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (damaged / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match=r"damaged/model.safetensors cannot be read"):
        load(damaged, cache=cache)
