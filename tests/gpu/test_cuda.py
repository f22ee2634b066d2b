"""The same models on a CUDA device: parity with transformers, generation, nccl. Skipped by name where there is none."""

from __future__ import annotations

import importlib.util
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tp_decoders
from cluster.engine.engine import generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, SamplingParams, StoppingCriteria
from parallel.attention.forward_pass import Pass
from parallel.ranks import mesh

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TINY = Path(__file__).parents[1] / "cluster" / "engine" / "tiny_models.py"


def _tiny() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_tiny_models", TINY)
    assert spec is not None and spec.loader is not None, TINY
    module = sys.modules["gpu_tiny_models"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _tiny()
FAMILIES = sorted(tiny.CONFIGS)


def _logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    model = tp_decoders.load(folder, dtype=dtype, device="cuda")
    with torch.no_grad():
        return model(tokens.cuda(), Pass.packed([len(tokens)], device="cuda")).float().cpu()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_on_cuda_equal_transformers(tmp_path: Path, family: str) -> None:
    reference = tiny.tiny_model(family)
    folder = tiny.save_tiny(family, tmp_path / family)
    tokens = torch.arange(40) % tiny.VOCAB
    with torch.no_grad():
        wanted = reference(tokens[None]).logits[0]
        half = reference.to("cuda", torch.bfloat16)(tokens[None].cuda()).logits[0].float().cpu()
    ours = _logits(folder, tokens, torch.float32)
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-4
    error = float((_logits(folder, tokens, torch.bfloat16) - wanted).norm())
    assert error <= 1.1 * float((half - wanted).norm()), "bfloat16 must err no more than transformers' own"


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_on_cuda_equals_generation_on_the_cpu(tmp_path: Path, family: str) -> None:
    folder = tiny.save_tiny(family, tmp_path / family)
    made = [_generated(folder, device) for device in ("cpu", "cuda")]
    assert made[0] == made[1]


def _generated(folder: Path, device: str) -> list[tuple[int, ...]]:
    config = EngineConfig(kv_blocks=64, max_step_tokens=16, max_sequences=4)
    engine = build_engine(build_runner(tp_decoders.load(folder, dtype=torch.float32, device=device), config, 0), config)
    requests = [
        Request(
            request_id=str(i),
            token_ids=tuple(range(1, 8 + 5 * i)),
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingCriteria(max_new_tokens=12, ignore_eos=True),
        )
        for i in range(4)
    ]
    return [tuple(results[0].token_ids) for results in generate(engine, requests)]


def test_an_nccl_group_of_one_sums_and_gathers() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = torch.distributed.TCPStore("127.0.0.1", port, 1, True)
    comm = mesh._torch_comm(store, 0, 1, mesh.Wiring(device=torch.device("cuda", 0)))
    x = torch.randn(5, 3, device="cuda")
    assert torch.equal(comm.sum(x), x)
    assert torch.equal(comm.all_gather(x, [3], 1), x)
    assert comm.broadcast_bytes(b"plan") == b"plan"
    comm.close()
