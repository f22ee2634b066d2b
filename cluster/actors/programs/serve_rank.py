"""A rank that serves: meets the others, loads its shard, sizes its cache, then drives the engine or follows it.

A `Program` (see worker.py), so it runs in one thread and knows no Ray. Rank 0 answers a front-end through an
EngineServer; when that is stopped it ends the command stream, which ends the other ranks. A rank that only lost its
peers keeps its weights and rejoins: everything that knew the peers, and the cache, is made anew.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cluster.actors.group.placement import Place
from cluster.actors.group.worker import MakeProgram, Phases, is_consequence
from cluster.actors.host.cpu_affinity import claim_cores, free_memory
from cluster.actors.host.flight_dump import write_dump
from cluster.actors.host.load_progress import reading
from cluster.actors.programs.serve_spec import RankFacts, ServeSpec
from cluster.engine.engine import Engine
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from cluster.engine.run.model_runner import ModelRunner
from cluster.link.engine_server import EngineServer
from cluster.training.checkpoint.state_folder import StateFolder
from cluster.training.service.train_coordinator import TrainCoordinator
from cluster.training.service.train_worker import SaveConfig, TrainWorker
from cluster.training.step.trainer import TrainerConfig
from cluster.training.train_calls import RestorePoint
from parallel.attention.forward_pass import Pass
from parallel.errors import ConfigError
from parallel.native.compiled import library
from parallel.ranks.mesh import Groups, Wiring, init_groups
from tp_decoders import load
from tp_decoders.adapters.peft_files import load_merged
from tp_decoders.hub.repository import here
from tp_decoders.hub.snapshot_cache import ADAPTER
from tp_decoders.model.decoder import Decoder
from tp_decoders.text.token_table import TokenTable, token_table
from tp_decoders.text.tokenizer import default_new_tokens, eos_token_ids, load_tokenizer


class ServeRank:
    """One rank of a serving group."""

    def __init__(self, spec: ServeSpec, place: Place, phases: Phases) -> None:
        self._spec, self._place, self._phases = spec, place, phases
        self._device = torch.device("cuda", 0) if spec.parallel.device == "cuda" else torch.device("cpu")
        self._folder = spec.model
        self._groups: Groups | None = None
        self._model: Decoder | None = None
        self._cores: tuple[int, ...] = ()
        self._runner: ModelRunner | None = None
        self._commands: Commands | None = None
        self._engine: Engine | None = None
        self._server: EngineServer | None = None
        self._training: TrainWorker | None = None
        self._training_room = 0
        self._all_cores = os.sched_getaffinity(0)

    def start(self) -> RankFacts:
        parallel, phases = self._spec.parallel, self._phases
        self._cores = claim_cores(self._place, parallel.threads, parallel.device)
        with phases(
            "finding the model"
        ):  # what came from the hub, on this node: the front-end's may have another cache
            given = self._spec.adapter
            self._folder, adapter = str(here(self._spec.model)), None if given is None else here(given, ADAPTER)
        with phases("building the kernels"):  # a minute, once per machine and version
            library.available()
        with phases("meeting the other ranks"):
            self._groups = self._meet()
        with phases("reading weights"):
            dtype = getattr(torch, parallel.dtype) if parallel.dtype else None
            model = self._load(dtype, self._groups)
            if adapter is not None:
                load_merged(model, adapter)
        return self._assemble(model, self._groups)

    def _load(self, dtype: torch.dtype | None, groups: Groups) -> Decoder:
        spec = self._spec
        cache, told = reading(self._place, self._folder, spec.weights_cache)
        return load(
            self._folder, spec.task, groups.tp, dtype, self._device, mpt_reference=spec.mpt_reference, cache=cache,
            progress=told, packed=not spec.training.enabled, quantize=spec.engine.quantize,
        )  # fmt: skip

    def rejoin(self, make: MakeProgram, place: Place, phases: Phases) -> RankFacts:
        """With new peers: the model as it is, now connected to them; the ranks' collectives are those of a start."""
        assert isinstance(make, ServeSpec), "a serving rank is made by its spec"
        assert self._groups is not None and self._model is not None, "a rank that was ready has both"
        self._spec, self._place, self._phases = make, place, phases
        os.sched_setaffinity(0, self._all_cores)
        self._cores = claim_cores(place, make.parallel.threads, make.parallel.device)
        with phases("meeting the other ranks"):
            met, known = self._meet(), self._groups.tp
            known.reconnect(met.tp.comm)  # every layer holds this one
            self._groups = replace(met, tp=known)
        return self._assemble(self._model, self._groups)

    def part(self, error: BaseException) -> bool:
        """Lets go of the peers, cache and engine. Trained ranks are not kept: what they hold is no state that could be
        completed; nor are GPUs, whose queues may still wait for a peer."""
        trained = self._training is not None and self._training.began
        if not is_consequence(error) or trained or self._device.type == "cuda" or self._groups is None:
            return False
        self._groups.close()
        self._engine = self._server = self._runner = self._commands = self._training = None
        return True

    def _assemble(self, model: Decoder, groups: Groups) -> RankFacts:
        """What is made anew for every group that the rank is part of, in step with its peers."""
        spec, phases = self._spec, self._phases
        self._model = model
        with phases("waiting for the other ranks"):  # a survivor for the one that loads, say
            if groups.tp.comm is not None:
                groups.tp.comm.barrier(spec.start_timeout_s)
        with phases("warming up"):
            warm_up(model)
        with phases("making the key/value cache"):
            self._runner = build_runner(model, spec.engine, self._room_for_cache(model))
        self._commands = Commands(groups.tp.comm, spec.parallel.collective_timeout_s)
        if spec.training.enabled:
            self._training = self._train_side(self._runner, groups)
        if spec.restore is not None:
            with phases("reading the saved state"):
                self._restore(spec.restore)
        if self._place.rank == 0:
            self._serve_engine(self._runner, self._commands)
        with phases("waiting for rank 0"):  # which reads a tokenizer, and gives signs of life only once it serves
            if groups.tp.comm is not None:
                groups.tp.comm.barrier(spec.start_timeout_s)
        return self._facts(self._runner, self._cores)

    def _restore(self, point: RestorePoint) -> None:
        assert self._training is not None, "only a server that trains has states to go back to"
        self._training.restore(point)

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._dump(error)
            raise

    def _work(self) -> None:
        assert self._runner is not None and self._commands is not None, "start first"
        if self._server is None or self._engine is None:
            follow(self._runner, self._commands, self._training.handlers if self._training else {})
        else:
            self._server.serve()
            self._engine.close()  # after a failure there is nobody to tell: not in a `finally`
        if self._training is not None:
            self._training.close()

    def _dump(self, error: Exception) -> None:
        """What this rank was in when it failed, to a file."""
        if self._commands is not None:
            flight, comm = self._spec.flight, self._commands.comm
            folder = None if flight.folder is None else Path(flight.folder)
            write_dump(folder, self._commands.flight, flight.group, self._place, error, comm)

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()

    def close(self) -> None:
        if self._groups is not None:
            self._groups.close()

    def _meet(self) -> Groups:
        parallel, place = self._spec.parallel, self._place
        wiring = Wiring(
            device=self._device,
            timeout_s=parallel.collective_timeout_s,
            start_timeout_s=self._spec.start_timeout_s,
            transport=parallel.transport,
            key=place.key,
        )
        return init_groups(
            place.rank, place.world, parallel.tp, parallel.dp, place.address, wiring=wiring, numerics=parallel.numerics
        )

    def _room_for_cache(self, model: Decoder) -> int:
        """What is free, less what training will take: its first call must find it."""
        free, training = free_memory(self._place, self._spec.parallel.device), self._spec.training
        if not training.enabled:
            return free
        from cluster.training.memory.memory_reserve import training_room  # a fifth of a second of a rank's start

        saves = training.save_root is not None
        self._training_room = room = training_room(model, training.micro_batch_tokens, training.recompute, saves)
        if room >= free and self._spec.engine.kv_blocks is None:
            raise ConfigError(
                f"training needs about {room / 2**30:.2f} GiB on rank {self._place.rank}, {free / 2**30:.2f} GiB are "
                "free: use more ranks, a smaller training.micro_batch_tokens or training.recompute=full; or set "
                "engine.kv_blocks, which then is all that is checked"
            )
        return max(free - room, 0)

    def _train_side(self, runner: ModelRunner, groups: Groups) -> TrainWorker:
        training = self._spec.training
        root = None if training.save_root is None else StateFolder(Path(training.save_root)).root
        config = TrainerConfig(micro_batch_tokens=training.micro_batch_tokens, recompute=training.recompute)
        return TrainWorker(runner, groups, config, SaveConfig(root=root, timeout_s=training.save_timeout_s))

    def _serve_engine(self, runner: ModelRunner, commands: Commands) -> None:
        ends = eos_token_ids(self._folder)
        if not ends:  # then the tokenizer may name the token that ends a text
            tokenizer = load_tokenizer(self._folder)
            ends = tokenizer.eos_token_ids if tokenizer else ()
        others = commands if self._place.world > 1 else None
        new_tokens = default_new_tokens(self._folder)
        self._engine = build_engine(runner, self._spec.engine, ends, others, new_tokens, self._token_table)
        changed, idle = self._engine.weights_changed, self._spec.training.session_idle_s
        lead = TrainCoordinator(self._training, commands, changed, idle) if self._training else None
        host = self._place.listen or self._place.node
        self._server = EngineServer(
            self._engine, self._spec.authkey, host=host, training=lead, prepare=self._engine.prepare
        )

    def _token_table(self, vocab_size: int, ends: Sequence[int]) -> TokenTable | None:
        tokenizer = load_tokenizer(self._folder)
        return None if tokenizer is None else token_table(tokenizer, vocab_size, ends)

    def _facts(self, runner: ModelRunner, cores: tuple[int, ...]) -> RankFacts:
        model, layout = runner.model, runner.cache.layout
        weights = list(model.parameters())
        return RankFacts(
            family=model.config.model_type,
            dtype=str(weights[0].dtype).removeprefix("torch."),
            quantization=self._spec.engine.quantize or "",
            parameters=sum(weight.numel() for weight in weights),
            kv_blocks=runner.cache.num_blocks,
            block_size=layout.block_size,
            kv_bytes=runner.cache.num_blocks * layout.bytes_per_block,
            training_bytes=self._training_room,
            attention=runner.backend.name,
            transport=_transport(model),
            cores=cores,
            threads=torch.get_num_threads(),
            kernels=library.in_use(),
            limits=self._engine.limits if self._engine else None,
            engine_address=self._server.address if self._server else None,
        )


@torch.inference_mode()
def warm_up(model: Decoder) -> None:
    """One forward of two tokens: weights are packed and kernels built before memory is counted and a client waits."""
    weight = next(model.parameters())
    tokens = torch.zeros(2, dtype=torch.long, device=weight.device)
    x_TD = model.hidden(tokens, Pass.packed([2], device=weight.device))
    if model.has_vocabulary:
        model.logits(x_TD, None)
    if model.task_head is not None:
        model.task_head(model.final(x_TD))


def _transport(model: Decoder) -> str:
    """How the ranks talk, by the name a user chooses it with."""
    comm = model.group.comm
    names = {"ShmComm": "shm", "TorchComm": "nccl" if next(model.parameters()).is_cuda else "gloo"}
    return "one rank" if comm is None else names.get(type(comm).__name__, type(comm).__name__)
