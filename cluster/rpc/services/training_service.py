"""The Training service: messages to calls, one call of the front-end, answers to messages. No rule lives here."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from cluster.access.access_errors import NotPermitted
from cluster.access.caller_limits import CALLER, WHO
from cluster.access.token_file import Role
from cluster.frontend.frontend import Frontend
from cluster.training.train_calls import Kind, OpenSession, TrainAnswer, TrainCall, TrainSequence
from tp_decoders.protocol import training_pb2 as pb
from tp_decoders.protocol.training_pb2_grpc import TrainingServicer

if TYPE_CHECKING:
    import grpc


class Training(TrainingServicer):
    """Steps on the weights that serve."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def TrainStep(self, request: pb.TrainStepRequest, context: grpc.aio.ServicerContext) -> pb.TrainStepResponse:
        answer = await self._train(Kind.TRAIN_STEP, request)
        return pb.TrainStepResponse(**_place(answer), **_pass(answer), **_step(answer), replayed=answer.replayed)

    async def ForwardBackward(
        self, request: pb.ForwardBackwardRequest, context: grpc.aio.ServicerContext
    ) -> pb.ForwardBackwardResponse:
        answer = await self._train(Kind.FORWARD_BACKWARD, request)
        return pb.ForwardBackwardResponse(
            **_place(answer), **_pass(answer), replayed=answer.replayed, waiting_calls=answer.waiting_calls
        )

    async def OptimStep(self, request: pb.OptimStepRequest, context: grpc.aio.ServicerContext) -> pb.OptimStepResponse:
        answer = await self._train(Kind.OPTIM_STEP, request)
        return pb.OptimStepResponse(**_place(answer), **_step(answer), replayed=answer.replayed)

    async def Evaluate(self, request: pb.EvaluateRequest, context: grpc.aio.ServicerContext) -> pb.EvaluateResponse:
        answer = await self._train(Kind.EVALUATE, request)
        return pb.EvaluateResponse(**_place(answer), **_pass(answer))

    async def GetTrainState(self, request: pb.GetTrainStateRequest, context: grpc.aio.ServicerContext) -> pb.TrainState:
        answer = await self._train(Kind.STATE, request)
        counts = {"step": answer.step, "weight_version": answer.weight_version}
        saved = [pb.SavedState(name=state.name, bytes=state.size, step=state.step) for state in answer.saved]
        counts |= {"waiting_calls": answer.waiting_calls, "incarnation": answer.incarnation}
        return pb.TrainState(**counts, saved=saved, saving=answer.saving, sessions=map(_session, answer.sessions))

    async def DropGradients(
        self, request: pb.DropGradientsRequest, context: grpc.aio.ServicerContext
    ) -> pb.DropGradientsResponse:
        _check_owner(request)
        answer = await self._train(Kind.DROP, request)
        return pb.DropGradientsResponse(step=answer.step, dropped_calls=answer.dropped, incarnation=answer.incarnation)

    async def SaveState(self, request: pb.SaveStateRequest, context: grpc.aio.ServicerContext) -> pb.SaveStateResponse:
        answer = await self._train(Kind.SAVE, request)
        return pb.SaveStateResponse(**_state(answer), bytes=answer.size)

    async def LoadState(self, request: pb.LoadStateRequest, context: grpc.aio.ServicerContext) -> pb.LoadStateResponse:
        return pb.LoadStateResponse(**_state(await self._train(Kind.LOAD, request)))

    async def Export(self, request: pb.ExportRequest, context: grpc.aio.ServicerContext) -> pb.ExportResponse:
        answer = await self._train(Kind.EXPORT, request)
        return pb.ExportResponse(**_state(answer), bytes=answer.size)

    async def _train(self, kind: Kind, request: Any) -> TrainAnswer:
        call, account = replace(train_call(kind, request), caller=WHO.get()), CALLER.get()
        with account.hold(sum(len(sequence.token_ids) for sequence in call.sequences)) if account else nullcontext():
            return await self._frontend.train(call)


def _check_owner(request: pb.DropGradientsRequest) -> None:
    """Another's gradients are dropped by those who control the server."""
    account = CALLER.get()
    if account is None or Role.CONTROL in account.grant.roles or request.caller in ("", WHO.get()):
        return
    raise NotPermitted(
        f"token {account.grant.name!r} may drop its own gradients; those of others need the role control"
    )


def train_call(kind: Kind, message: Any) -> TrainCall:
    """What a request asks for; a field that its kind does not have counts as not given."""
    fields = message.DESCRIPTOR.fields_by_name
    options = message.loss_options if "loss_options" in fields else None
    return TrainCall(
        kind=kind,
        sequences=tuple(map(_sequence, message.sequences)) if "sequences" in fields else (),
        loss=message.loss if "loss" in fields else "",
        loss_options=_set_fields(options),
        optimizer=_set_fields(message.optimizer if "optimizer" in fields else None),
        normaliser=_optional(message, "normaliser"),
        expected_step=_optional(message, "expected_step"),
        expected_incarnation=_optional(message, "expected_incarnation"),
        idempotency_key=message.idempotency_key if "idempotency_key" in fields else "",
        session=message.session if "session" in fields else "",
        owner=_optional(message, "caller"),
        name=message.name if "name" in fields else "",
        dropout_seed=_optional(message, "dropout_seed"),
    )


def _session(session: OpenSession) -> pb.TrainSession:
    seconds = {"open_seconds": session.open_seconds, "idle_seconds": session.idle_seconds}
    return pb.TrainSession(caller=session.caller, name=session.name, calls=session.calls, **seconds)


def _sequence(message: pb.TrainSequence) -> TrainSequence:
    return TrainSequence(
        token_ids=tuple(message.token_ids),
        loss_weights=tuple(message.loss_weights),
        old_logprobs=tuple(message.old_logprobs),
        advantages=tuple(message.advantages),
        reference_logprobs=tuple(message.reference_logprobs),
        labels=tuple(message.labels),
        values=tuple(message.values),
        chosen=message.chosen,
        mark=_optional(message, "mark"),
    )


def _set_fields(message: Message | None) -> dict[str, float]:
    return {} if message is None else {field.name: value for field, value in message.ListFields()}


def _optional(message: Any, field: str) -> Any:
    return getattr(message, field) if field in message.DESCRIPTOR.fields_by_name and message.HasField(field) else None


def _place(answer: TrainAnswer) -> dict[str, Any]:
    timings = pb.TrainTimings(
        forward_backward=answer.forward_seconds,
        optimizer=answer.optimizer_seconds,
        collectives=answer.collective_seconds,
    )
    place = {"step": answer.step, "weight_version": answer.weight_version, "incarnation": answer.incarnation}
    return {**place, "timings": timings}


def _pass(answer: TrainAnswer) -> dict[str, Any]:
    logprobs = [pb.SequenceLogprobs(values=values) for values in answer.logprobs]
    return {"loss": answer.loss, "tokens": answer.tokens, "logprobs": logprobs, "metrics": answer.metrics}


def _step(answer: TrainAnswer) -> dict[str, Any]:
    return {"grad_norm": answer.grad_norm, "learning_rate": answer.learning_rate}


def _state(answer: TrainAnswer) -> dict[str, Any]:
    names = ("step", "name", "weight_version", "replayed", "incarnation")
    return {name: getattr(answer, name) for name in names}
