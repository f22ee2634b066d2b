"""The blocking client. Every call has a deadline, retries included. Where the server is lost, calls are sent
again under the same id: a stream goes on after what was received, and a step of training is never applied twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, TypeVar, Unpack

from tp_decoders.access.access import Access
from tp_decoders.client.chunk_streams import Stream
from tp_decoders.client.link_of import OVERLOAD_RETRIES, RETRY_S, TIMEOUT_S, link_of
from tp_decoders.client.transport.connection import Connection
from tp_decoders.client.transport.link import DEFAULT, as_it_was, named
from tp_decoders.client.values import answers, asks, server
from tp_decoders.client.values import training as trained
from tp_decoders.client.values.asks import Ask
from tp_decoders.client.values.requests import (
    GenerateOptions,
    Prompt,
    generate_request,
    prompt_message,
    prompt_messages,
)
from tp_decoders.client.values.training import Trainable

A = TypeVar("A")


class Client:
    """Calls of one server, from any thread; after a fork the child has a connection of its own.

    `address`: HOST:PORT, grpc://HOST:PORT or grpcs://HOST:PORT (TLS); None: TP_DECODERS_ADDRESS, else 127.0.0.1:50051.
    `access`: whom to trust and what to bring; None: TP_DECODERS_TLS_CA, TP_DECODERS_TOKEN_FILE and TP_DECODERS_TOKEN.

    `timeout`: seconds for a whole call, retries included; each call can have its own; None: no limit. A lost server is
    waited for up to `retry_seconds` without an answer (0: never), one that was never reached is not. A full one is
    asked again `overload_retries` times, when it says so. Errors are those of tp_decoders.client.errors.
    """

    def __init__(
        self,
        address: str | None = None,
        access: Access | None = None,
        *,
        timeout: float | None = TIMEOUT_S,
        retry_seconds: float = RETRY_S,
        overload_retries: int = OVERLOAD_RETRIES,
    ) -> None:
        self._link = link_of(address, access, timeout, retry_seconds, overload_retries)
        self._connection = Connection(self._link)
        self._incarnation: int | None = None  # of the ranks' memory, as the last answer of a training call said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends open calls. No other call can be made."""
        self._connection.close()

    def ready(self, timeout: float = 10.0) -> None:
        """Waits until the server accepts connections; Unavailable where it does not in time."""
        self._connection.ready(timeout)

    def generate(
        self, prompt: Prompt, *, timeout: float | None = DEFAULT, **options: Unpack[GenerateOptions]
    ) -> answers.Generation:
        """Continues one prompt: text, token ids or a FillInMiddle."""
        request = generate_request([prompt_message(prompt)], options)
        generation = (self._ask(Ask("inference.Generate", request, answers.generations), timeout))[0]
        if generation.error is not None:
            raise generation.error
        return generation

    def generate_batch(
        self, prompts: Sequence[Prompt], *, timeout: float | None = DEFAULT, **options: Unpack[GenerateOptions]
    ) -> list[answers.Generation]:
        """Continues several prompts in one call. One that fails has its `error`; where all fail the call does."""
        request = generate_request(prompt_messages(prompts, "prompts"), options)
        return self._ask(Ask("inference.Generate", request, answers.generations), timeout)

    def stream(self, prompt: Prompt, *, timeout: float | None = DEFAULT, **options: Unpack[GenerateOptions]) -> Stream:
        """Continues one prompt, chunk by chunk; nothing is sent before the first is asked for."""
        return Stream(self._connection, named(generate_request([prompt_message(prompt)], options)), timeout, True)

    def stream_batch(
        self, prompts: Sequence[Prompt], *, timeout: float | None = DEFAULT, **options: Unpack[GenerateOptions]
    ) -> Stream:
        """Continues several prompts, their chunks mixed as they come. A prompt that fails ends with an `error`."""
        request = generate_request(prompt_messages(prompts, "prompts"), options)
        return Stream(self._connection, named(request), timeout, False)

    def score(
        self, sequences: Sequence[Prompt], *, timeout: float | None = DEFAULT, **options: Any
    ) -> list[answers.Score]:
        """Log-probabilities of each sequence's tokens after the first.

        Options: temperature, top_logprobs, priority, adapter, request_id.
        """
        return self._ask(asks.score(sequences, options), timeout)

    def embed(
        self, sequences: Sequence[Prompt], mean: bool = False, *, timeout: float | None = DEFAULT, **options: Any
    ) -> list[answers.Embedding]:
        """The last token's final hidden state of each sequence, or the mean of all.

        Options: normalize, priority, request_id.
        """
        return self._ask(asks.embed(sequences, mean, options), timeout)

    def classify(
        self, sequences: Sequence[Prompt], *, timeout: float | None = DEFAULT, **options: Any
    ) -> answers.Classifications:
        """What the head of the server's task makes of each sequence. Options: num_choices, marks, num_spans,
        max_answer_tokens, priority, request_id.
        """
        return self._ask(asks.classify(sequences, options), timeout)

    def tokenize(self, texts: Sequence[str], *, timeout: float | None = DEFAULT) -> list[tuple[int, ...]]:
        """Each text's token ids."""
        return self._ask(asks.tokenize(texts), timeout)

    def detokenize(self, sequences: Sequence[Sequence[int]], *, timeout: float | None = DEFAULT) -> list[str]:
        """Each sequence's text."""
        return self._ask(asks.detokenize(sequences), timeout)

    def train_step(
        self, sequences: Sequence[Trainable], *, timeout: float | None = DEFAULT, **options: Any
    ) -> trained.TrainStep:
        """forward_backward and optim_step in one. Options: the fields of TrainStepRequest, as loss, loss_options,
        optimizer, expected_step, normaliser, dropout_seed, session, idempotency_key (one is made).
        """
        return self._ask(asks.train_step(sequences, options), timeout)

    def forward_backward(
        self, sequences: Sequence[Trainable], *, timeout: float | None = DEFAULT, **options: Any
    ) -> trained.ForwardBackward:
        """Adds gradients to those that wait. Options: the fields of ForwardBackwardRequest."""
        return self._ask(asks.forward_backward(sequences, options), timeout)

    def optim_step(self, *, timeout: float | None = DEFAULT, **options: Any) -> trained.OptimStep:
        """Applies the waiting gradients. Options: those of OptimStepRequest, as optimizer, expected_step, session."""
        return self._ask(asks.optim_step(options), timeout)

    def evaluate(
        self, sequences: Sequence[Trainable], *, timeout: float | None = DEFAULT, **options: Any
    ) -> trained.Evaluated:
        """Loss and log-probabilities at the present weights; changes nothing."""
        return self._ask(asks.evaluate(sequences, options), timeout)

    def save_state(self, name: str, *, timeout: float | None = DEFAULT, **options: Any) -> trained.Saved:
        """Weights and optimiser state under a new name; returns when they are on the disk."""
        return self._ask(asks.save_state(name, options), timeout)

    def load_state(self, name: str, *, timeout: float | None = DEFAULT, **options: Any) -> trained.Loaded:
        """Back to a saved state."""
        return self._ask(asks.load_state(name, options), timeout)

    def export(self, name: str, *, timeout: float | None = DEFAULT, **options: Any) -> trained.Saved:
        """The weights alone, as a Hugging Face checkpoint."""
        return self._ask(asks.export(name, options), timeout)

    def drop_gradients(self, *, timeout: float | None = DEFAULT, **options: Any) -> trained.Dropped:
        """Forgets the gradients that wait in the caller's session."""
        return self._ask(asks.drop_gradients(options), timeout)

    def train_state(self, *, timeout: float | None = DEFAULT) -> trained.TrainState:
        """Where training stands, and what is saved."""
        return self._ask(asks.train_state(), timeout)

    def server_info(self, *, timeout: float | None = DEFAULT) -> server.ServerInfo:
        """The server, its limits, whether it is ready."""
        return self._ask(asks.server_info(), timeout)

    def model_info(self, *, timeout: float | None = DEFAULT) -> server.ModelInfo:
        """The model that is served."""
        return self._ask(asks.model_info(), timeout)

    def load(self, *, timeout: float | None = DEFAULT) -> server.Load:
        """How busy the server is."""
        return self._ask(asks.load(), timeout)

    def health(self, service: str = "", *, timeout: float | None = DEFAULT) -> str:
        """What grpc.health.v1 says of a service, as in SERVING."""
        return self._ask(asks.health(service), timeout)

    def abort(self, request_ids: Sequence[str], *, timeout: float | None = DEFAULT) -> int:
        """Ends open requests by id; how many prompts that were."""
        return self._ask(asks.abort(request_ids), timeout)

    def drain(self, grace_seconds: float, *, timeout: float | None = DEFAULT) -> int:
        """Stops the server in order; how many prompts did not end in time."""
        return self._ask(asks.drain(grace_seconds), timeout)

    def restart(self, grace_seconds: float, *, timeout: float | None = DEFAULT) -> tuple[int, int]:
        """Starts each replica's ranks anew; how many replicas, and how many prompts were handed over."""
        return self._ask(asks.restart(grace_seconds), timeout)

    def _ask(self, ask: Ask[A], timeout: Any) -> A:
        connection = self._connection
        if ask.repeat and not (ask.changes and self._incarnation is None):
            again = self._expecting if ask.changes else as_it_was
            found = connection.ask(ask.method, ask.request, timeout, again)
        else:
            found = connection.call(ask.method, ask.request, timeout)
        if ask.changes:
            self._incarnation = found.incarnation
        return ask.answer(found)

    def _expecting(self, request: Any) -> None:
        """A repetition is refused where the ranks were made anew since: what waited there is gone."""
        if not request.HasField("expected_incarnation"):
            request.expected_incarnation = self._incarnation
