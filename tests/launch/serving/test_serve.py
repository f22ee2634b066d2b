"""The whole product at once: the real command, two ranks on a local Ray, gRPC, signals, faults, exit statuses."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.rpc.client.client import AsyncClient, Client, ServiceError
from launch.commands.server_process import Server
from launch.main import main
from parallel.native.compiled import library
from parallel.native.compiled.instruction_set import BFLOAT16_ORDER

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[3]
SORTER = ROOT / "tests" / "data" / "gpt-nano-sort"
PATIENT = ["server.drain_seconds=60", "placement.silence_s=60", "parallel.collective_timeout_s=60"]
ARGUMENTS = ["--model", str(SORTER), "--preset", "small", "--cluster", "cpu-2", *PATIENT]
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Compiled here if need be, outside the limits below."""
    library.available()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states") / "root"


@pytest.fixture(scope="module")
def server(states: Path) -> Iterator[Server]:
    with Server([*ARGUMENTS, "--train", "--save-root", os.path.relpath(states)]) as running:
        yield running


def processes_of(pid: int) -> set[int]:
    """A process and all its descendants."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    family = {pid}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return family


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in _status(pid)}


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "\nState:\tZ"


def ranks_of(pid: int) -> list[int]:
    """The processes that hold ranks, as Ray names them."""
    return sorted(child for child in processes_of(pid) if _name(child).startswith(b"ray::Worker"))


def _name(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_one_line_says_what_is_served(server: Server) -> None:
    assert server.ready.startswith("ready: 127.0.0.1:")
    cache = "KV cache 4096 tokens (256 blocks of 16"
    said = ("model gpt-nano-sort (gpt2, float32)", "tp=2 on cpu", cache, "training on")
    for words in said:
        assert words in server.ready


def test_two_ranks_serve_a_trained_model(server: Server) -> None:
    async def ask() -> list[list[int]]:
        async with AsyncClient(server.address) as client:
            answer = await client.generate(
                [[2, 1, 0, 1, 0, 2], [1, 1, 1, 0, 0, 0]], sampling=GREEDY, stopping={"max_new_tokens": 6}
            )
            assert (await client.server_info()).kernels.split() == [library.instruction_set(), BFLOAT16_ORDER]
            return [list(result.samples[0].token_ids) for result in answer.results]

    assert asyncio.run(ask()) == [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1]]
    ranks = ranks_of(server.pid)
    assert len(ranks) == 2
    assert {os.getpriority(os.PRIO_PROCESS, rank) for rank in ranks} == {os.getpriority(os.PRIO_PROCESS, 0)}, "niced"


def test_clients_train_and_save_under_the_folder_that_the_command_was_given(server: Server, states: Path) -> None:
    with Client(server.address) as client:
        still = {"learning_rate": 0.0}  # the tests that follow need the weights as they are
        assert client.train_step([[2, 1, 0, 1]], optimizer=still, expected_step=0).weight_version == 1
        assert client.save_state("state").step == client.export("plain").step == 1
        assert client.load_state("state", expected_step=1).weight_version == 2
    assert sorted(path.name for path in states.iterdir()) == ["plain", "state"]
    assert json.loads((states / "plain" / "config.json").read_text())["model_type"] == "gpt2"


def test_the_command_line_client_streams_to_the_terminal(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    ids = ["--token-ids", "2,1,0,1,0,2"]
    assert (
        main(["generate", *ids, "--address", server.address, "--temperature", "0", "--max-new-tokens", "6", "--stats"])
        == 0
    )
    captured = capsys.readouterr()
    assert captured.out.split() == ["0", "0", "1", "1", "2", "2"]
    assert "6 tokens" in captured.err and "LENGTH" in captured.err


def test_several_samples_are_printed_one_after_the_other(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["generate", "--token-ids", "2 1 0", "-n", "2", "--address", server.address, "--max-new-tokens", "3"]) == 0
    )
    assert capsys.readouterr().out.count("--- sample") == 2


def test_beams_are_printed_best_first_with_their_scores(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    beams = ["--beams", "2", "-n", "2", "--length-penalty", "0.5", "--early-stopping", "never"]
    ids = ["--token-ids", "2,1,0,1,0,2", "--max-new-tokens", "6"]
    assert main(["generate", *ids, *beams, "--address", server.address]) == 0
    heading, tokens, *_ = capsys.readouterr().out.split("--- sample ")[1].split("\n")
    assert heading.startswith("0  score ") and -0.1 < float(heading.split()[-1]) <= 0
    assert tokens.split() == ["0", "0", "1", "1", "2", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hello"], "no tokenizer"),
        (["--token-ids", "2,1", "--beams", "4", "--beam-groups", "3", "--diversity-penalty", "1"], "must divide"),
        (["--token-ids", "2,1", "--temperature", "-1"], "temperature"),
        (["--token-ids", "2,7"], "7"),
        (["--token-ids", "2,1", "--max-new-tokens", "-5"], "out of range"),
    ],
)
def test_a_refused_request_is_one_line_and_status_2(
    server: Server, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["generate", *arguments, "--address", server.address]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_benchmark_measures_a_running_server(
    server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    sizes = ["--streams", "4", "--requests", "8", "--prompt-tokens", "4", "--new-tokens", "6"]
    assert main(["bench", "serve", "--address", server.address, *sizes, "--json", str(figures)]) == 0
    assert "8 streams, 0 failed" in capsys.readouterr().out
    recorded = json.loads(figures.read_text())
    assert recorded["new_tokens"] == 48
    assert 0 < recorded["first_token_ms"]["p50"] <= recorded["first_token_ms"]["p99"]


def test_a_port_in_use_is_refused_before_anything_starts(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    port = server.address.rpartition(":")[2]
    assert main(["serve", *ARGUMENTS, "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    assert time.monotonic() - began < 60


def test_a_folder_for_states_that_cannot_be_one_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["serve", *ARGUMENTS, "--port", "0", "--train", "--save-root", str(tmp_path / "file")]) == 2
    assert "file cannot be used: [Errno 17] File exists" in capsys.readouterr().err


def test_sigterm_lets_open_requests_end_then_exits_with_0_and_leaves_nothing(server: Server) -> None:
    """The last test of the shared server: a request is open when the signal arrives."""
    family = processes_of(server.pid)
    assert len(family) > 3

    async def ask() -> int:
        async with AsyncClient(server.address) as client:
            prompts = [[2, 1, 0, 1, 0, 2]] * 64
            count = 0
            async for chunk in client.stream(prompts, sampling=GREEDY, stopping={"max_new_tokens": 6}):
                if count == 0:
                    os.kill(server.pid, signal.SIGTERM)
                count += len(chunk.token_ids)
            return count

    assert asyncio.run(ask()) == 64 * 6
    assert server.wait(200) == 0
    assert wait_until_gone(family), alive(family)


def wait_until_gone(pids: set[int], within: float = 100.0) -> bool:
    limit = time.monotonic() + within
    while alive(pids) and time.monotonic() < limit:
        time.sleep(0.1)
    return not alive(pids)


def test_a_killed_rank_ends_streams_with_its_name_and_the_server_with_status_1() -> None:
    """Its weights are in eight bits, which changes nothing of that."""
    server = Server([*ARGUMENTS, "--quantize", "int8", "placement.max_restarts=0"])
    server.__enter__()
    assert "model gpt-nano-sort (gpt2, bfloat16, int8 weights)" in server.ready
    family = processes_of(server.pid)
    asyncio.run(expect_fault(server))
    assert server.wait(200) == 1
    assert "the engine is gone: rank" in server.complaint
    assert "its process died" in server.complaint
    assert wait_until_gone(family), alive(family)


async def expect_fault(server: Server) -> None:
    """Kills a rank and waits for the server to say so to a client."""
    async with AsyncClient(server.address, retry_seconds=0) as client:
        assert (await client.model_info(timeout=60)).quantization == "int8"
        sorted_ids = await client.generate([[2, 1, 0, 1, 0, 2]], sampling=GREEDY, stopping={"max_new_tokens": 6})
        assert list(sorted_ids.results[0].samples[0].token_ids) == [0, 0, 1, 1, 2, 2]
        os.kill(ranks_of(server.pid)[-1], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(ServiceError) as failed:
            while time.monotonic() - began < 100:
                await client.generate([[2, 1, 0]], sampling=GREEDY, stopping={"max_new_tokens": 3}, timeout=100)
        assert failed.value.code.name == "UNAVAILABLE"
        assert "rank " in str(failed.value)


def test_sigterm_while_starting_ends_the_start() -> None:
    process = subprocess.Popen([sys.executable, "-m", "launch", "serve", "--port", "0", *ARGUMENTS], cwd=ROOT)
    limit = time.monotonic() + 150
    while len(processes_of(process.pid)) < 4 and time.monotonic() < limit:
        time.sleep(0.1)
    family = processes_of(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) in (0, 130)
    assert wait_until_gone(family), alive(family)
