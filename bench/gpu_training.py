"""Model FLOP utilisation of training on one device, against the matrix products it can do.

    python bench/gpu_training.py --model pythia-1.4b --recompute selective
    python bench/gpu_training.py --model gpt-neox-20b --lora-rank 16 --recompute full

Random weights of a preset of configs/models: shapes decide the speed, not values. A step is forward, backward, clipping
and AdamW over `--sequences` sequences of `--length` tokens. Prints one JSON line: tokens/s of the median step, FLOP/s
of the model's arithmetic, the ceiling (a large product of the same type, measured before), the share reached and the
peak memory. Without a CUDA device it says so and exits with status 1; `--device cpu` tries the script out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cluster.training.step.train_batch import TrainBatch
    from cluster.training.step.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]


def trainer_of(options: argparse.Namespace, device: torch.device) -> Trainer:
    from cluster.training.step.trainer import Trainer, TrainerConfig
    from launch.presets import find, read
    from parallel.ranks.group import Group
    from parallel.ranks.mesh import Groups
    from tp_decoders.adapters.lora import attach
    from tp_decoders.checkpoint.load_save import build, initialise
    from tp_decoders.model.lora_config import LoraConfig
    from tp_decoders.registry import config_from_hf

    config = config_from_hf(dict(read(find(options.model, "models")).values))
    model = initialise(build(config, dtype=getattr(torch, options.dtype), device=device))
    if options.lora_rank:
        attach(model, LoraConfig(rank=options.lora_rank), seed=0)
    groups = Groups(Group.single(), Group.single())
    given = TrainerConfig(recompute=options.recompute, micro_batch_tokens=options.micro_batch_tokens)
    return Trainer(model, groups, given)


def batch_of(options: argparse.Namespace, vocab_size: int, device: torch.device) -> TrainBatch:
    from cluster.training.step.train_batch import TrainBatch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (options.sequences, options.length), generator=generator)
    targets = torch.cat([ids[:, 1:], torch.full((options.sequences, 1), -100)], 1)
    return TrainBatch(
        token_ids=ids.flatten().to(device), targets=targets.flatten().to(device),
        weights=torch.ones(ids.numel(), device=device), lengths=(options.length,) * options.sequences,
        normaliser=float(options.sequences * (options.length - 1)),
    )  # fmt: skip


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, object]:
    from cluster.training.step.flops import ModelFlops, product_ceiling

    ceiling = product_ceiling(device, getattr(torch, options.dtype))
    trainer = trainer_of(options, device)
    batch = batch_of(options, trainer.model.config.vocab_size, device)
    seconds = []
    for _ in range(options.steps + 1):
        started = time.perf_counter()
        trainer.forward_backward(batch)
        trainer.optim_step()  # its norm is read by the host: the step is over
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[1:])
    rate = ModelFlops.of(trainer.model)(batch.lengths) / median
    return {
        "model": options.model, "lora_rank": options.lora_rank, "dtype": options.dtype, "recompute": options.recompute,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "tokens_per_s": round(len(batch.token_ids) / median, 1), "step_s": round(median, 3),
        "tflops": round(rate / 1e12, 3), "ceiling_tflops": round(ceiling / 1e12, 3), "mfu": round(rate / ceiling, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a preset of configs/models")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank instead of all weights")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--micro-batch-tokens", type=int, default=None)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured", file=sys.stderr)
        return 1
    print(json.dumps(measure(options, torch.device(options.device))))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
