"""Every family on the emulated CUDA device beside the CPU. Run as a module; prints one JSON line a family.

A process of its own: the guard comes before torch, and inference mode is replaced in the whole process.
"""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

from tests.gpu.emulated import guard

guard.load()

import torch  # noqa: E402

from tests.gpu.emulated.device import CUDA, Emulation, host, install  # noqa: E402

install()

from cluster.engine.engine import generate  # noqa: E402
from cluster.engine.engine_builder import build_engine, build_runner  # noqa: E402
from cluster.engine.engine_config import EngineConfig  # noqa: E402
from cluster.engine.request import Request, SamplingParams, StoppingCriteria  # noqa: E402
from cluster.training.step.train_batch import TrainBatch  # noqa: E402
from cluster.training.step.trainer import Trainer, TrainerConfig  # noqa: E402
from parallel.ranks.group import Group  # noqa: E402
from parallel.ranks.mesh import Groups  # noqa: E402
from parallel.ranks.process_group import Channels, TorchComm  # noqa: E402
from tests.gpu.emulated.tiny_configs import CONFIGS, VOCAB  # noqa: E402
from tp_decoders.checkpoint.load_save import build, initialise  # noqa: E402
from tp_decoders.padded.padded_model import PaddedModel  # noqa: E402
from tp_decoders.registry import config_from_hf  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"seed": 7, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
}


def model(family: str, device: str, dtype: torch.dtype = torch.float32, group: Group | None = None) -> Any:
    return initialise(build(config_from_hf(dict(CONFIGS[family])), group or Group.single("fast"), dtype, device))


def tokens(family: str, device: str, kind: str, emulation: Emulation, dtype: torch.dtype = torch.float32,
           block: int = 16, group: Group | None = None) -> dict[str, Any]:  # fmt: skip
    """What three prompts of unlike lengths are answered, and the most waits and copies of a decode step."""
    blocks = 32 if block == 16 else 8
    config = EngineConfig(kv_blocks=blocks, max_step_tokens=48, max_sequences=4, block_size=block)
    runner = build_runner(model(family, device, dtype, group), config, 0)
    run, waits, copies = runner.run, [], []

    def counted(plan: Any) -> Any:
        emulation.clear()
        result = run(plan)
        if max(plan.query_lens) == 1:
            waits.append(sum(emulation.waits.values()))
            copies.append(sum(emulation.copies.values()))
        return result

    runner.run = counted  # type: ignore[method-assign]
    requests = [
        Request(
            request_id=str(i),
            token_ids=tuple((7 * j + i) % VOCAB for j in range(20 + 30 * i)),
            sampling=SamplingParams(**KINDS[kind]),
            stopping=StoppingCriteria(max_new_tokens=6, ignore_eos=True),
        )
        for i in range(3)
    ]
    answers = generate(build_engine(runner, config), requests)
    ids = [list(result.token_ids) for answer in answers for result in answer]
    return {"ids": ids, "waits": max(waits), "copies": max(copies), "backend": runner.backend.name}


class Echo:
    """In nccl's place: every peer has what this rank has. Values are no model's; devices and counts are."""

    def allreduce(self, tensors: list[torch.Tensor], *options: Any) -> Echo:
        return self

    def _allgather_base(self, out: torch.Tensor, x: torch.Tensor, *options: Any) -> Echo:
        out.view(-1, x.numel()).copy_(x.reshape(1, -1).expand(out.numel() // x.numel(), -1))
        return self

    def wait(self, *limit: Any) -> bool:
        return True


def one_of_two(family: str, emulation: Emulation) -> int:
    """The most waits of a greedy decode step on rank 0 of two."""
    store: Any = None
    channels = Channels(data=Echo(), control=None, store=store, device=CUDA, verify=False)
    group = Group(0, 2, TorchComm(0, 2, channels), "invariant")
    return tokens(family, "cuda:0", "greedy", emulation, group=group)["waits"]


def trained(family: str, device: str, emulation: Emulation) -> tuple[list[float], list[torch.Tensor], int]:
    """Loss and norm of two AdamW steps with dropout, the gradients of the first, and an update's waits."""
    trainer = Trainer(
        made := model(family, device), Groups(Group.single(), Group.single()), TrainerConfig(micro_batch_tokens=64)
    )
    ids = (torch.arange(96) * 13) % VOCAB
    batch = TrainBatch(
        token_ids=ids.to(device), targets=torch.roll(ids, -1).to(device), weights=torch.ones(96).to(device),
        lengths=(32, 40, 24), normaliser=96.0,
    )  # fmt: skip
    numbers, grads, waits = [], [], 0
    for step in range(2):
        numbers.append(trainer.forward_backward(batch, dropout_seed=5).loss)
        if step == 0:
            grads = [host(p.grad).clone() for p in made.parameters() if p.grad is not None]
            grads = grads or [host(flat.grad).clone() for flat in trainer.optimizer.flats]
        emulation.clear()
        numbers.append(trainer.optim_step(1e-3).grad_norm)
        waits = sum(emulation.waits.values())
    return numbers, grads, waits


def padded(family: str, device: str) -> list[torch.Tensor]:
    """Loss and every gradient of a padded call."""
    made = model(family, device)
    ids = (torch.arange(32).view(2, 16) * 5) % VOCAB
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    out = PaddedModel(made)(ids.to(device), attention_mask=mask.to(device), labels=labels.to(device))
    assert out.loss is not None, "labels were given"
    out.loss.backward()
    return [host(out.loss).detach(), *(host(p.grad) for p in made.parameters() if p.grad is not None)]


def worst(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest relative error of a list of tensors."""
    assert len(ours) == len(theirs) and ours, "both have the same, and some, gradients"
    return max(float((a - b).norm() / b.norm().clamp_min(1e-6)) for a, b in zip(ours, theirs, strict=True))


def compared(family: str, emulation: Emulation) -> dict[str, Any]:
    found: dict[str, Any] = {"family": family, "cpu_indices": {}}
    for kind in KINDS:
        found[kind] = [tokens(family, device, kind, emulation) for device in ("cpu", "cuda:0")]
    found["flash"] = tokens(family, "cuda:0", "greedy", emulation, torch.bfloat16, 256)
    emulation.clear()
    ours, our_grads, found["update_waits"] = trained(family, "cuda:0", emulation)
    theirs, their_grads, _ = trained(family, "cpu", emulation)
    found["numbers"] = [ours, theirs]
    found["gradients"] = worst(our_grads, their_grads)
    found["padded"] = worst(padded(family, "cuda:0"), padded(family, "cpu"))
    found["one_of_two"] = one_of_two(family, emulation)
    found["cpu_indices"] = dict(emulation.cpu_indices)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=list(CONFIGS))
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with Emulation() as emulation:
        for family in parser.parse_args().families:
            print(json.dumps(compared(family, emulation)), flush=True)


if __name__ == "__main__":
    main()
