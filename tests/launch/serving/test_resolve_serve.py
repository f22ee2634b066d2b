"""The door of `serve`: every part's own part is worked out, without Ray and, where there are no certificates, gRPC."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from launch.presets import build, overrides
from launch.serving.resolve_serve import ResolvedServe, quantised_dtype, resolve_serve
from launch.serving.serve_config import ServeConfig
from parallel.errors import ConfigError

NANO = Path(__file__).resolve().parents[2] / "data" / "gpt-nano-sort"


def resolved(*settings: str) -> ResolvedServe:
    return resolve_serve(build(ServeConfig, [overrides([f"model={NANO}", "server.port=0", *settings])]), 20)


def test_each_part_is_handed_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    server = resolved("training.enabled=true", "training.save_root=states", "server.state_dir=here", "ray.num_cpus=2")
    assert server.program.model == str(NANO) and server.program.training.save_root == str(tmp_path / "states")
    assert server.state is not None and server.state.folder == tmp_path / "here"
    assert not server.state.ranks, "they end with a Ray cluster of the command's own"
    assert (server.cores, server.replicas, server.placement.log_level) == (2, 1, 20)
    assert server.frontend.recovery_seconds == math.inf and server.metrics is None
    with pytest.raises(FrozenInstanceError):
        server.replicas = 2  # type: ignore[misc]


def test_replicas_are_the_servers_business_and_no_faults_are_waited_out_where_none_is_healed() -> None:
    server = resolved("parallel.dp=2", "ray.num_cpus=4", "placement.max_restarts=0", "observe.metrics_port=0")
    assert (server.replicas, server.program.parallel.dp) == (2, 1) and server.frontend.recovery_seconds == 0.0
    assert server.metrics is not None and server.metrics.host == "127.0.0.1"


def test_quantised_weights_are_served_in_bfloat16_on_cpus_and_stay_as_they_are() -> None:
    assert resolved("engine.quantize=int4").program.parallel.dtype == "bfloat16"
    for more, words in {
        "parallel.device=cuda": "on CPUs only",
        "parallel.dtype=float32": "take bfloat16",
        "training.enabled=true": "are not trained",
    }.items():
        with pytest.raises(ConfigError, match=f"engine.quantize is 'int8'.* {words}"):
            resolved("engine.quantize=int8", more)
    with pytest.raises(ConfigError, match="merge it first"):
        quantised_dtype(build(ServeConfig, [overrides([f"model={NANO}", "engine.quantize=int8", "adapter=some"])]))
    with pytest.raises(ConfigError, match="engine.quantize is 'int2'; choose one of"):
        resolved("engine.quantize=int2")


def test_what_is_refused_is_refused_before_ray_and_grpc_are_imported() -> None:
    code = (
        "import sys; from tests.launch.serving.test_resolve_serve import resolved; resolved('ray.num_cpus=1')\n"
        "print([name for name in ('ray', 'grpc') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
