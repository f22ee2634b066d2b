"""Single-stream decode on one CUDA device, as a share of what its memory can deliver.

    python bench/gpu_decode.py --config DIR [--dtype bfloat16] [--new-tokens 128]

Random weights of the model that DIR/config.json describes: shapes decide the speed, not values. Prints one JSON line:
tokens/s, the bytes of weights read per token, the bandwidth of a copy on the same device, and the share reached. Needs
a CUDA device; without one it says so and exits with status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def copy_bandwidth(num_bytes: int = 4 << 30) -> float:
    """Bytes per second, read plus written, of the best of ten copies."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return num_bytes / best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a folder with the config.json of a model")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--backend", default=None, help="flash, sdpa or eager; the best one unless given")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured", file=sys.stderr)
        return 1
    from cluster.engine.engine import generate
    from cluster.engine.engine_builder import build_engine, build_runner
    from cluster.engine.engine_config import EngineConfig
    from cluster.engine.request import Request, SamplingParams, StoppingCriteria
    from tp_decoders.checkpoint.load_save import build, initialise
    from tp_decoders.registry import read_config

    model = initialise(build(read_config(options.config), dtype=getattr(torch, options.dtype), device="cuda"))
    config = EngineConfig(kv_blocks=256, max_sequences=1, attention_backend=options.backend)
    runner = build_runner(model, config, 0)
    engine = build_engine(runner, config)
    stopping = StoppingCriteria(max_new_tokens=options.new_tokens, ignore_eos=True)
    seconds = []
    for number in range(4):
        request = Request(
            request_id=str(number),
            token_ids=tuple(range(32)),
            sampling=SamplingParams(temperature=0.0),
            stopping=stopping,
        )
        torch.cuda.synchronize()
        started = time.perf_counter()
        generate(engine, [request])
        seconds.append(time.perf_counter() - started)
    rate = options.new_tokens / min(seconds[1:])
    embedding = model.embed.weight.nbytes if model.embed.weight is not model.head.linear.weight else 0
    read = sum(parameter.nbytes for parameter in model.parameters()) - embedding
    bandwidth = copy_bandwidth()
    row = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": options.dtype,
        "backend": runner.backend.name, "tokens_per_s": round(rate, 2), "bytes_per_token": read,
        "copy_bandwidth": round(bandwidth / 1e9, 1), "share": round(rate * read / bandwidth, 3),
    }  # fmt: skip
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
