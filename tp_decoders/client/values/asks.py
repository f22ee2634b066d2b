"""Every call as a value: method, message, how its answer is read, and whether it may be sent again. Both clients make
their calls of these.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from tp_decoders.client.values import answers, server
from tp_decoders.client.values import training as trained
from tp_decoders.client.values.from_message import read
from tp_decoders.client.values.requests import Prompt, filled, prompt_messages
from tp_decoders.client.values.training import Trainable, train_sequences
from tp_decoders.protocol import control_pb2 as control
from tp_decoders.protocol import inference_pb2 as inference
from tp_decoders.protocol import training_pb2 as training

A = TypeVar("A", covariant=True)
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Ask(Generic[A]):
    """One call. `repeat`: sent again where the server is lost. `changes`: it changes weights or gradients."""

    method: str
    request: Message
    answer: Callable[[Any], A]
    repeat: bool = True
    changes: bool = False


def score(sequences: Sequence[Prompt], options: Options) -> Ask[list[answers.Score]]:
    request = inference.ScoreRequest(sequences=prompt_messages(sequences, "sequences"))
    return Ask("inference.Score", filled(request, options), answers.scores)


def embed(sequences: Sequence[Prompt], mean: bool, options: Options) -> Ask[list[answers.Embedding]]:
    pooling = "POOLING_MEAN" if mean else "POOLING_LAST"
    request = inference.EmbedRequest(sequences=prompt_messages(sequences, "sequences"), pooling=pooling)
    return Ask("inference.Embed", filled(request, options), answers.embeddings)


def classify(sequences: Sequence[Prompt], options: Options) -> Ask[answers.Classifications]:
    request = inference.ClassifyRequest(sequences=prompt_messages(sequences, "sequences"))
    return Ask("inference.Classify", filled(request, options), answers.classifications)


def tokenize(texts: Sequence[str]) -> Ask[list[tuple[int, ...]]]:
    request = filled(inference.TokenizeRequest(), {"texts": texts})
    return Ask("inference.Tokenize", request, answers.token_lists)


def detokenize(sequences: Sequence[Sequence[int]]) -> Ask[list[str]]:
    request = filled(inference.DetokenizeRequest(), {"sequences": [{"ids": ids} for ids in sequences]})
    return Ask("inference.Detokenize", request, answers.texts)


def server_info() -> Ask[server.ServerInfo]:
    return Ask("control.GetServerInfo", control.GetServerInfoRequest(), _as(server.ServerInfo))


def model_info() -> Ask[server.ModelInfo]:
    return Ask("control.GetModelInfo", control.GetModelInfoRequest(), _as(server.ModelInfo))


def load() -> Ask[server.Load]:
    return Ask("control.GetLoad", control.GetLoadRequest(), _as(server.Load))


def health(service: str) -> Ask[str]:
    names = health_pb2.HealthCheckResponse.ServingStatus
    request = health_pb2.HealthCheckRequest(service=service)
    return Ask("health.Check", request, lambda found: str(names.Name(found.status)))


def abort(request_ids: Sequence[str]) -> Ask[int]:
    request = filled(control.AbortRequest(), {"request_ids": request_ids})
    return Ask("control.Abort", request, lambda found: int(found.aborted))


def drain(grace_seconds: float) -> Ask[int]:
    request = control.DrainRequest(grace_seconds=grace_seconds)
    return Ask("control.Drain", request, lambda found: int(found.aborted), repeat=False)


def restart(grace_seconds: float) -> Ask[tuple[int, int]]:
    request = control.RestartRequest(grace_seconds=grace_seconds)
    return Ask("control.Restart", request, lambda found: (found.replicas, found.handed_over), repeat=False)


def train_step(sequences: Sequence[Trainable], options: Options) -> Ask[trained.TrainStep]:
    request = training.TrainStepRequest(sequences=train_sequences(sequences))
    return _change("training.TrainStep", request, options, trained.TrainStep)


def forward_backward(sequences: Sequence[Trainable], options: Options) -> Ask[trained.ForwardBackward]:
    request = training.ForwardBackwardRequest(sequences=train_sequences(sequences))
    return _change("training.ForwardBackward", request, options, trained.ForwardBackward)


def optim_step(options: Options) -> Ask[trained.OptimStep]:
    return _change("training.OptimStep", training.OptimStepRequest(), options, trained.OptimStep)


def evaluate(sequences: Sequence[Trainable], options: Options) -> Ask[trained.Evaluated]:
    request = training.EvaluateRequest(sequences=train_sequences(sequences))
    return Ask("training.Evaluate", filled(request, options), _as(trained.Evaluated))


def save_state(name: str, options: Options) -> Ask[trained.Saved]:
    return _change("training.SaveState", training.SaveStateRequest(), {"name": name, **options}, trained.Saved)


def load_state(name: str, options: Options) -> Ask[trained.Loaded]:
    return _change("training.LoadState", training.LoadStateRequest(), {"name": name, **options}, trained.Loaded)


def export(name: str, options: Options) -> Ask[trained.Saved]:
    return _change("training.Export", training.ExportRequest(), {"name": name, **options}, trained.Saved)


def drop_gradients(options: Options) -> Ask[trained.Dropped]:
    request = filled(training.DropGradientsRequest(), options)
    return Ask("training.DropGradients", request, _as(trained.Dropped), repeat=False)


def train_state() -> Ask[trained.TrainState]:
    return Ask("training.GetTrainState", training.GetTrainStateRequest(), _as(trained.TrainState))


def _change(method: str, request: Any, options: Options, kind: type[A]) -> Ask[A]:
    """Under a key, so that what was applied is not applied twice."""
    filled(request, options)
    request.idempotency_key = request.idempotency_key or uuid.uuid4().hex
    return Ask(method, request, _as(kind), changes=True)


def _as(kind: type[A]) -> Callable[[Message], A]:
    return lambda found: read(kind, found)
