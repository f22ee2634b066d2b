"""Models by their name on the Hugging Face hub, read from a hub on this machine: which files, which commit, which of
cache and network; and every fault in one line.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from parallel.errors import CheckpointError, ConfigError
from parallel.ranks.group import Group
from tests.tp_decoders.checkpoint.test_load import as_bin, assert_same, full, write
from tests.tp_decoders.hub.local_hub import LocalHub
from tp_decoders import load
from tp_decoders.hub import repository as hub_module
from tp_decoders.hub.repository import here, locate, shown_name
from tp_decoders.hub.snapshot_cache import ADAPTER, CONFIG, TOKENIZER
from tp_decoders.text.tokenizer import load_tokenizer

NAME = "org/tiny"
FILES = "/{repo_id}/resolve/{revision}/{filename}"
TOKENIZER_FOLDER = Path(__file__).resolve().parents[2] / "data" / "tokenizers" / "gpt2"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A running hub with one model; this process asks it, with an empty cache."""
    with LocalHub().running() as running:
        use(running, tmp_path / "cache", monkeypatch)
        write(tmp_path / "tiny", "gpt_neox")
        (tmp_path / "tiny" / "flax_model.msgpack").write_bytes(b"not wanted")
        (tmp_path / "tiny" / "pytorch_model.bin").write_bytes(b"not wanted")
        running.add(NAME, tmp_path / "tiny")
        yield running


def use(hub: LocalHub, cache: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    settings = {"ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False, **more}
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + FILES)
    monkeypatch.setattr(hub_module, "PAUSES_S", (0.01, 0.01))
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_only_the_needed_files_are_fetched_weights_last(hub: LocalHub, tmp_path: Path) -> None:
    assert_same(full(load(NAME)), full(load(tmp_path / "tiny")))
    assert hub.fetched() == ["config.json", "generation_config.json", "model.safetensors"]


def test_the_second_time_nothing_but_the_commit_is_asked_and_without_the_hub_nothing(hub: LocalHub) -> None:
    commit = hub.refs[NAME]["main"]
    folder = locate(NAME)
    assert folder.name == commit and shown_name(folder) == f"{NAME}@{commit[:12]}"
    hub.asked.clear()
    assert locate(NAME) == folder
    assert hub.asked == [f"GET /api/models/{NAME}/revision/main"]
    hub.asked.clear()
    assert locate(f"{NAME}@{commit}") == folder and here(folder) == folder
    assert hub.asked == []


def test_what_was_fetched_is_read_again_when_the_hub_is_gone_and_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = LocalHub()
    write(tmp_path / "tiny", "mpt")
    with server.running():
        use(server, tmp_path / "cache", monkeypatch)
        server.add(NAME, tmp_path / "tiny")
        folder = locate(NAME)
    assert locate(NAME) == folder
    assert "cannot be reached" in caplog.text and "taken from the cache" in caplog.text
    assert_same(full(load(NAME)), full(load(tmp_path / "tiny")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(NAME) == folder
    with pytest.raises(CheckpointError, match="org/other is no folder here and not in the cache .* HF_HUB_OFFLINE"):
        locate("org/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match="org/other is no folder here, and .* cannot be reached .*refused"):
        locate("org/other")


def test_a_revision_is_a_branch_a_tag_or_a_commit_and_moves_with_its_branch(hub: LocalHub, tmp_path: Path) -> None:
    write(tmp_path / "v2", "gpt2")
    tagged = hub.add(NAME, tmp_path / "v2", "v2")
    assert locate(f"{NAME}@v2").name == tagged
    assert locate(f"{NAME}@{tagged}").name == tagged
    assert locate(NAME).name != tagged
    hub.refs[NAME]["main"] = tagged
    assert locate(NAME).name == tagged


def test_an_indexed_checkpoint_is_fetched_with_all_its_files_and_bin_only_where_nothing_else_is(
    hub: LocalHub, tmp_path: Path
) -> None:
    tensors = write(tmp_path / "one", "gpt2")
    write(tmp_path / "many", "gpt2", max_shard_size="10KB")
    hub.add("org/many", tmp_path / "many")
    assert_same(full(load("org/many")), tensors)
    as_bin(tmp_path / "one", tensors)
    hub.add("org/bin", tmp_path / "one")
    assert_same(full(load("org/bin")), tensors)


def test_a_fetch_that_was_broken_off_is_gone_on_with(hub: LocalHub, tmp_path: Path) -> None:
    write(tmp_path / "many", "gpt2", max_shard_size="10KB")
    hub.add("org/many", tmp_path / "many")
    last = sorted((tmp_path / "many").glob("model-*.safetensors"))[-1].name
    hub.faults[last] = [500] * 9
    with pytest.raises(CheckpointError, match=f"cannot give {last} of org/many now .HTTP status 500"):
        locate("org/many")
    hub.faults.clear()
    hub.asked.clear()
    assert_same(full(load("org/many")), full(load(tmp_path / "many")))
    assert hub.fetched() == [last]


def test_tokenizer_config_and_adapter_alone(hub: LocalHub, tmp_path: Path) -> None:
    shutil.copytree(TOKENIZER_FOLDER, tmp_path / "tiny", dirs_exist_ok=True)
    (tmp_path / "tiny" / "additional_chat_templates").mkdir()
    (tmp_path / "tiny" / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (tmp_path / "tiny" / "onnx").mkdir()
    (tmp_path / "tiny" / "onnx" / "tokenizer.json").write_text("not wanted")
    tokenizer = load_tokenizer(NAME)
    assert tokenizer is not None and tokenizer.encode("hello") == load_tokenizer(TOKENIZER_FOLDER).encode("hello")  # type: ignore[union-attr]
    assert not {name for name in hub.fetched() if name.startswith("model")}
    assert hub.fetched().count("tokenizer.json") == 1 and "tool.jinja" in hub.fetched()
    assert {path.name for path in locate(NAME, CONFIG).iterdir()} >= {"config.json"}
    assert locate(NAME, TOKENIZER) == locate(NAME, CONFIG)
    with pytest.raises(CheckpointError, match="org/tiny on .* is no adapter this project reads: it lacks adapter_con"):
        locate(NAME, ADAPTER)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    (lora / "adapter_model.safetensors").write_bytes(b"")
    (lora / "optimizer.pt").write_bytes(b"")
    hub.add("org/lora", lora)
    assert {path.name for path in locate("org/lora", ADAPTER).iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="it is an adapter: give it as --adapter"):
        locate("org/lora")


def test_a_folder_of_that_name_wins_and_that_is_said(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "org" / "tiny", "gpt2")
    with caplog.at_level(logging.INFO):
        assert load(NAME).config.model_type == "gpt2"
    assert "org/tiny is a folder here: it is read, not the hub's repository" in caplog.text
    assert hub.asked == []


@pytest.mark.parametrize("name", ["org/na me", "org/tiny@../../x", "org/tiny@a b", "a--b/c", "org/x.git"])
def test_what_is_no_name_is_refused_before_anything_is_asked(name: str, hub: LocalHub) -> None:
    with pytest.raises(ConfigError, match="ORG/NAME|revision"):
        load(name)
    assert hub.asked == []


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./org/tiny", "../org/tiny", "tiny", "a/b/c"])
def test_what_can_only_be_a_path_is_not_asked_for(path: str, hub: LocalHub) -> None:
    with pytest.raises(CheckpointError, match="has no config.json"):
        load(path)
    assert hub.asked == []


def test_refusals_of_the_hub_are_one_line_each(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("org/gated")
    hub.add("org/gated", hub.repos[NAME][hub.refs[NAME]["main"]])
    for name, words in {
        "org/gated": "org/gated is gated: ask for access on http://.*/org/gated, then set HF_TOKEN",
        "org/none": "org/none is no folder here and no repository on .*, or a private one: .* HF_TOKEN",
        f"{NAME}@v9": "org/tiny on .* has no revision 'v9'",
    }.items():
        with pytest.raises(CheckpointError, match=words) as caught:
            load(name)
        assert "\n" not in str(caught.value)
    hub.token = "secret"
    with pytest.raises(CheckpointError, match="refuses org/tiny .401.: it is private, or .*; set HF_TOKEN"):
        load(NAME)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert load(NAME).config.model_type == "gpt_neox"


def test_what_passes_is_tried_again_and_a_slow_hub_is_given_up(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults = {"revision/main": [500, 503], "config.json": [502], "model.safetensors": [429]}
    assert load(NAME).config.model_type == "gpt_neox"
    hub.delay_s = 1.0
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    with pytest.raises(CheckpointError, match="org/slow: .* does not answer in time"):
        locate("org/slow")


def test_a_transfer_that_breaks_off_goes_on_and_at_last_says_so(hub: LocalHub) -> None:
    hub.short["model.safetensors"] = 9
    with pytest.raises(CheckpointError, match="model.safetensors of org/tiny: the transfer from .* broke off"):
        load(NAME)
    hub.short["model.safetensors"] = 2
    assert load(NAME).config.model_type == "gpt_neox"


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b'{"id": "org/tiny", "sha": "../../x", "siblings": []}'])
def test_what_is_no_hub_is_called_so(answer: bytes, hub: LocalHub) -> None:
    hub.strange = answer
    with pytest.raises(CheckpointError, match="HF_ENDPOINT"):
        load(NAME)


def test_a_disk_without_room_is_said_before_the_weights_and_a_full_one_when_it_is_full(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        usage = namedtuple("usage", "total used free")
        patched.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
        with pytest.raises(CheckpointError, match=r"org/tiny needs 0.0 GB in .*, where 0.0 GB are free; make room"):
            load(NAME)
    assert "model.safetensors" not in hub.fetched()

    def full_disk(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_module, "hf_hub_download", full_disk)
    with pytest.raises(CheckpointError, match="of org/tiny cannot be kept in .*: the disk is full"):
        load(NAME)


def test_another_family_is_refused_before_its_weights_are_fetched(hub: LocalHub, tmp_path: Path) -> None:
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ConfigError, match="llama"):
        load(NAME)
    assert "model.safetensors" not in hub.fetched()


def test_an_index_that_leaves_its_repository_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "tiny" / "model.safetensors").unlink()
    (tmp_path / "tiny" / "pytorch_model.bin").unlink()
    index = tmp_path / "tiny" / "model.safetensors.index.json"
    wrong = {"../../secret": "name of a file in the same folder", "model-9.safetensors": "has no model-9"}
    for name, words in wrong.items():
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        hub.add(f"org/bad{len(words)}", tmp_path / "tiny")
        with pytest.raises(CheckpointError, match=words):
            load(f"org/bad{len(words)}")


def test_a_node_without_the_snapshot_fetches_the_same_commit(hub: LocalHub, tmp_path: Path, monkeypatch: Any) -> None:
    folder = locate(NAME)
    shutil.rmtree(tmp_path / "cache")
    hub.refs[NAME]["main"] = "0" * 40
    use(hub, tmp_path / "other-cache", monkeypatch)
    again = here(folder)
    assert again != folder and again.name == folder.name and again.is_relative_to(tmp_path / "other-cache")


def loaded_together(group: Group, endpoint: str, cache: str) -> tuple[str, float]:
    before = constants.ENDPOINT, constants.HF_HUB_CACHE, file_download.HUGGINGFACE_CO_URL_TEMPLATE
    constants.ENDPOINT, constants.HF_HUB_CACHE = endpoint, f"{cache}-{group.rank}"
    file_download.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + FILES
    try:
        model = load(NAME, group=group)
    except CheckpointError as error:
        return str(error), 0.0
    finally:
        constants.ENDPOINT, constants.HF_HUB_CACHE, file_download.HUGGINGFACE_CO_URL_TEMPLATE = before
    assert model.source is not None
    return model.source.name, float(sum(p.double().sum() for p in model.parameters()))


def test_ranks_that_load_a_name_read_one_commit_or_all_fail(
    hub: LocalHub, tmp_path: Path, ranks: Callable[..., list[Any]]
) -> None:
    found = ranks(2, loaded_together, hub.endpoint, str(tmp_path / "rank-cache"))
    assert {commit for commit, _ in found} == {hub.refs[NAME]["main"]}
    assert hub.asked.count(f"GET /api/models/{NAME}/revision/main") == 1
    del hub.repos[NAME]
    for message, _ in ranks(2, loaded_together, hub.endpoint, str(tmp_path / "none")):
        assert "no repository on" in message


def test_fetched_weights_are_what_was_published(hub: LocalHub, tmp_path: Path) -> None:
    model = load(NAME, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert (locate(NAME) / "model.safetensors").read_bytes() == (tmp_path / "tiny" / "model.safetensors").read_bytes()
