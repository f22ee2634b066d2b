"""Metrics scraped over HTTP from a real server match what was served; the dashboard asks for none that is not there."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from cluster.access.access_config import Security
from cluster.engine.engine import Engine
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import EngineLoad, RankReport
from cluster.frontend.fleet.request_metrics import TrainingMetrics
from cluster.frontend.frontend import Frontend
from cluster.frontend.readiness import Readiness
from cluster.frontend.requests.call import FrontendConfig
from cluster.link.local_link import LocalLink
from cluster.rpc.client.client import AsyncClient
from cluster.rpc.server import build_server
from launch.observe.metrics_server import MetricsServer, check_host
from launch.observe.observe_config import ObserveConfig
from launch.observe.prometheus_metrics import ServeMetrics, engine_metrics, training_metrics
from launch.training.train_metrics import TrainMetrics
from parallel.errors import ConfigError
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.frontend.fakes import FakeEngine
from tests.cluster.frontend.harness import PlayedLink
from tp_decoders import load

DASHBOARD = Path(__file__).resolve().parents[3] / "launch" / "grafana" / "tp-decoders.json"
Samples = dict[str, float]


@pytest.fixture(scope="module")
def engine_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("gpt2", tmp_path_factory.mktemp("gpt2"))


def engine_of(folder: Path) -> Engine:
    config = EngineConfig(kv_blocks=32, max_sequences=4, max_step_tokens=64)
    return build_engine(build_runner(load(str(folder)), config, 0), config)


def scrape(port: int) -> Samples:
    """Every sample by its name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


async def served(engine: Engine | FakeEngine, prompts: list[list[int]], new_tokens: int) -> tuple[Samples, Samples]:
    """Metrics before and after prompts went through a real gRPC server."""
    frontend = Frontend(LocalLink(engine))
    readiness = Readiness(frontend)
    server = build_server(frontend, "127.0.0.1:0", readiness=readiness)
    frontend.start()
    await readiness.prove()
    await server.start()
    loop = asyncio.get_running_loop()
    try:
        metrics = MetricsServer(ServeMetrics(frontend, readiness, loop, {"model_id": "tiny"}), "127.0.0.1", 0)
        with closing(metrics):
            before = await asyncio.to_thread(scrape, metrics.port)
            async with AsyncClient(f"127.0.0.1:{server.port}") as client:
                for prompt in prompts:
                    await client.generate(
                        [prompt], sampling={"temperature": 0.0},
                        stopping={"max_new_tokens": new_tokens, "ignore_eos": True},
                    )  # fmt: skip
            return before, await asyncio.to_thread(scrape, metrics.port)
    finally:
        await server.stop(1.0)
        await frontend.close()


def test_what_is_scraped_is_what_was_served(engine_folder: Path) -> None:
    prompts = [list(range(1, 41)), list(range(1, 41)), [5, 6, 7]]
    before, after = asyncio.run(served(engine_of(engine_folder), prompts, 12))
    name = "tp_decoders_"
    assert before[name + "generated_tokens_total{replica=0}"] == 0 and before[name + "ready"] == 1
    expected = {
        "generated_tokens_total{replica=0}": 36, "delivered_tokens_total": 36, "prompt_tokens_total{replica=0}": 83,
        "prefix_tokens_looked_up_total{replica=0}": 83,
        "prefix_tokens_reused_total{replica=0}": 32,  # two full blocks of 16 of the second
        "requests_running{replica=0}": 0, "requests_waiting{replica=0}": 0, "requests_open": 0,
        "kv_blocks{replica=0}": 32, "kv_usage_ratio{replica=0}": 0,
        "samples_finished_total{reason=length}": 3, "time_to_first_token_seconds_count": 3,
        "inter_token_seconds_count": 33, "request_seconds_count": 3, "engine_answers{replica=0}": 1,
        "canaries_total{replica=0}": 1, "state{state=serving}": 1, "info{model_id=tiny}": 1,
        "weight_version{replica=0}": 0, "restarts_total{replica=0}": 0, "replica_ready{replica=0}": 1,
        "outstanding_tokens{replica=0}": 0, "prompts_routed_total{by=load,replica=0}": 3,
    }  # fmt: skip
    assert {key: after[name + key] for key in expected} == expected
    assert after[name + "steps_total{replica=0}"] == 36
    named = ("schedule", "forward", "commit")
    parts = {part: after[f"{name}step_seconds_total{{part={part},replica=0}}"] for part in named}
    assert all(seconds > 0 for seconds in parts.values())
    assert after[name + "time_to_first_token_seconds_bucket{le=+Inf}"] == 3
    assert after[name + "request_seconds_sum"] > after[name + "inter_token_seconds_sum"] > 0
    memory = [value for key, value in after.items() if "rank_memory_bytes" in key and "kind=host" in key]
    assert len(memory) == 1 and memory[0] > 50_000_000


def test_the_numbers_of_replicas_are_apart_and_those_of_a_lost_one_stay_as_they_were() -> None:
    async def main() -> None:
        links = [PlayedLink(), PlayedLink()]
        for index, link in enumerate(links):
            link.answer = EngineLoad(generated_tokens=10 + index, collectives={"tree_sum": (index, 0)})
        frontend = Frontend(links, config=FrontendConfig(recovery_seconds=60.0))
        metrics = ServeMetrics(frontend, Readiness(frontend), asyncio.get_running_loop())
        frontend.start()
        assert numbers(await metrics.take()) == {"0": (10, 1), "1": (11, 1)}
        links[1].answer = EngineLoad(generated_tokens=99)
        frontend.fault("its process died", 1)
        assert numbers(await metrics.take()) == {"0": (10, 1), "1": (11, 0)}
        await frontend.close()

    asyncio.run(main())


def numbers(families: list[Metric]) -> dict[str, tuple[float, float]]:
    """Each replica's generated tokens, and whether its engine answered."""
    of_name = {family.name: family.samples for family in families}
    tokens, answers = (
        {sample.labels["replica"]: sample.value for sample in of_name["tp_decoders_" + name]}
        for name in ("generated_tokens", "engine_answers")
    )
    return {replica: (tokens[replica], answers[replica]) for replica in tokens}


def test_a_canary_that_finds_a_fault_makes_the_server_not_ready_and_says_so_in_the_metrics() -> None:
    before, _ = asyncio.run(served(FakeEngine(canary_fault="rank 1 computes nonsense"), [], 1))
    assert before["tp_decoders_ready"] == 0 and before["tp_decoders_canary_failures_total"] == 1


def test_every_query_of_the_dashboard_names_a_metric_that_exists(engine_folder: Path) -> None:
    _, after = asyncio.run(served(engine_of(engine_folder), [[1, 2, 3]], 2))
    known = {key.partition("{")[0] for key in after}
    known |= {"tp_decoders_" + name for name in LABELLED}
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    named = {name for query in queries for name in re.findall(r"tp_decoders_\w+", query)}
    assert len(queries) >= 15 and named <= known, named - known
    assert all(re.search(r"tp_decoders_\w+", query) for query in queries), "each asks for one of ours"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


LABELLED = (
    "collectives_total", "collective_bytes_total", "collective_seconds_total", "prompts_failed_total",
    "training_calls_total",
)  # fmt: skip
"""Families that have no sample before something of their kind happened."""


def test_time_in_collectives_is_given_by_kind_and_by_rank() -> None:
    ranks = tuple(
        RankReport(rank=rank, node="n", pid=1, memory_bytes=1, collective_seconds=2.5 + rank) for rank in (0, 1)
    )
    load = EngineLoad(
        collectives={"tree_sum": (3, 99)}, collective_seconds={"tree_sum": 1.5, "barrier": 0.5}, ranks=ranks
    )
    train = TrainingMetrics(forward_seconds=4.0, collective_seconds=1.0)
    families = (*engine_metrics({0: load}), *training_metrics(train))
    found = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    name = "tp_decoders_collective_seconds_total"
    assert [found[name, "0", kind] for kind in ("tree_sum", "barrier")] == [1.5, 0.5]
    assert [found["tp_decoders_rank_collective_seconds_total", "0", rank, "n"] for rank in "01"] == [2.5, 3.5]
    assert found[("tp_decoders_training_collective_seconds_total",)] == 1.0


def test_a_training_run_gives_its_last_step_and_totals_since_it_was_watched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = {"step": 1, "loss": 9.0, "grad_norm": 2.0, "tokens": 100, "seconds": 0.5, "mfu": 0.2, "eval_loss": 8.5}
    record["collective_seconds"] = 0.2
    path.write_text(json.dumps(record) + "\n")
    with closing(MetricsServer(TrainMetrics(path, 10), "127.0.0.1", 0)) as metrics:
        before = scrape(metrics.port)
        with path.open("a") as file:
            for step in (2, 3):
                file.write(json.dumps({**record, "step": step, "loss": 9.0 - step, "eval_loss": None}) + "\n")
        after = scrape(metrics.port)
    name = "tp_decoders_run_"
    assert before[name + "step"] == 1 and before[name + "tokens_total"] == 0, "not what an earlier command did"
    expected = {"step": 3, "steps_wanted": 10, "loss": 6.0, "grad_norm": 2.0, "mfu_ratio": 0.2, "eval_loss": 8.5}
    assert {key: after[name + key] for key in expected} == expected
    assert after[name + "tokens_total"] == 200 and after[name + "step_seconds_total"] == 1.0
    assert after[name + "collective_seconds_total"] == pytest.approx(0.4)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_metrics_that_others_could_read_are_refused_unless_it_is_said_in_words(host: str) -> None:
    with pytest.raises(ConfigError, match="metrics_host.*insecure-listen-anywhere"):
        check_host(host, Security(token_file="tokens"), insecure=False)
    check_host(host, Security(), insecure=True)
    check_host("127.0.0.1", Security(), insecure=False)


def test_metrics_are_off_and_on_loopback_unless_asked_for() -> None:
    assert ObserveConfig().metrics_port is None and ObserveConfig().metrics_host == "127.0.0.1"
    with pytest.raises(ConfigError, match="metrics_port"):
        ObserveConfig(metrics_port=70000)
