"""The real command is watched: metrics of two ranks, its status, and after a rank was killed the flight record that
names it and a canary through the new one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.rpc.client.client import Client
from launch.commands.server_process import Server
from launch.main import main
from parallel.native.compiled import library
from tests.cluster.engine.tiny_models import save_tiny
from tests.launch.observe.test_prometheus_metrics import Samples, scrape

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NAME = "tp_decoders_"


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flight")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, dumps: Path) -> Iterator[Server]:
    library.available()
    model = save_tiny("gpt2", tmp_path_factory.mktemp("gpt2") / "model")
    states = ["--train", "--save-root", f"{dumps}-states"]
    flags = ["--preset", "small", "--cluster", "cpu-2", "--metrics-port", "0", *states]
    settings = ["engine.kv_blocks=64", f"observe.flight_dir={dumps}", "observe.canary_every_s=0.5"]
    settings += ["placement.silence_s=60", "parallel.collective_timeout_s=60"]
    with Server(["--model", str(model), *flags, *settings]) as running:
        yield running


def metrics_of(server: Server) -> Samples:
    return scrape(int(server.ready.rpartition("metrics 127.0.0.1:")[2].split()[0]))


def test_metrics_tell_of_both_ranks_and_of_what_was_served_and_trained(server: Server) -> None:
    with Client(server.address) as client:
        client.generate([[1, 2, 3]], sampling={"temperature": 0.0}, stopping={"max_new_tokens": 9, "ignore_eos": True})
        step = client.train_step([[2, 1, 0, 1]], optimizer={"learning_rate": 1e-3}, expected_step=0)
        client.save_state("kept")  # or the rank that is lost below would take trained weights with it
    found = metrics_of(server)
    assert found[NAME + "generated_tokens_total{replica=0}"] == found[NAME + "delivered_tokens_total"] == 9
    ranks = {key: value for key, value in found.items() if "rank_memory_bytes" in key and "kind=host" in key}
    assert len(ranks) == 2 and min(ranks.values()) > 50_000_000
    assert found[NAME + "collectives_total{kind=tree_sum,replica=0}"] >= 9 * 4
    of_rank_0 = "{kind=tree_sum,replica=0}"
    assert found[NAME + "collective_bytes_total" + of_rank_0] > found[NAME + "collectives_total" + of_rank_0]
    assert found[NAME + "training_step"] == 1 and found[NAME + "training_calls_total{kind=TrainStep}"] == 1
    assert found[NAME + "training_loss"] == pytest.approx(step.loss, rel=1e-6)
    assert found[NAME + "training_grad_norm"] == pytest.approx(step.grad_norm, rel=1e-6)
    assert found[NAME + "training_tokens_total"] == step.tokens == 4


def status(server: Server, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, object]]]:
    exit_status = main(["status", "--address", server.address, "--json"])
    return exit_status, json.loads(capsys.readouterr().out)


def test_a_killed_rank_is_named_by_the_flight_record_and_the_next_canary_goes_through_its_successor(
    server: Server, dumps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready, before = status(server, capsys)
    old = [rank["pid"] for rank in before["load"]["ranks"]]  # type: ignore[attr-defined, index]
    assert ready == 0 and len(old) == 2 and before["health"]["Inference"] == "SERVING"
    os.kill(old[1], signal.SIGKILL)
    limit = time.monotonic() + 200
    while True:
        ready, now = status(server, capsys)
        pids = [rank["pid"] for rank in now.get("load", {}).get("ranks", ())]  # type: ignore[attr-defined]
        if ready == 0 and len(pids) == 2 and pids[1] != old[1]:
            break
        assert time.monotonic() < limit, server.said[-3000:]
        time.sleep(0.1)
    assert now["server"]["restarts"] == 1, server.said[-6000:]
    assert metrics_of(server)[NAME + "restarts_total{replica=0}"] == 1
    assert main(["flight", str(dumps)]) == 0
    said = capsys.readouterr().out
    assert "=> rank 1 left no dump: killed, frozen or cut off" in said and "rank 0 was" in said
    assert "rank 0 on" in said and "CollectiveError" in said
