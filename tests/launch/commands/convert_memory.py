"""Run as a program: the most anonymous memory that `convert` takes. Arguments: those of `convert`; prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def run(arguments: list[str]) -> None:
    import torch

    from launch.main import main
    from tests.tp_decoders.checkpoint.load_memory import Sampler

    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    warm_up = Path(arguments[1]).with_name("warm-up")
    assert main(["init", "tiny-gpt2", str(warm_up)]) == 0  # whatever is loaded once per process
    sampler = Sampler()
    before = sampler.now()
    with sampler:
        status = main(["convert", *arguments])
    print(json.dumps({"peak": sampler.most - before, "samples": sampler.samples, "status": status}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))
    run(sys.argv[1:])
