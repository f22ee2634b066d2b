"""A client of the server over gRPC, blocking and asynchronous, with typed answers: docs/client.md. Imports neither
torch nor ray nor what serves and trains, and is installed without them by the pyproject.toml beside this file: only
grpcio with its health checks, googleapis-common-protos and protobuf come along.
"""

from tp_decoders.access.access import Access
from tp_decoders.client.async_client import AsyncClient
from tp_decoders.client.chunk_streams import AsyncStream, Stream
from tp_decoders.client.client import Client
from tp_decoders.client.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    ClientError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Overloaded,
    PermissionDenied,
    ServiceError,
    SettingsError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Violation,
)
from tp_decoders.client.values.answers import Chunk, FinishReason, Generation, Sample, Score, Usage
from tp_decoders.client.values.requests import Beam, FillInMiddle, GenerateOptions, Prompt, StructuredOutputs
from tp_decoders.client.values.server import Load, ModelInfo, ServerInfo
from tp_decoders.client.values.training import TrainSequence

__all__ = [
    "Aborted", "Access", "AlreadyExists", "AsyncClient", "AsyncStream", "Beam", "Cancelled", "Chunk", "Client",
    "ClientError", "DeadlineExceeded", "FailedPrecondition", "FillInMiddle", "FinishReason", "GenerateOptions",
    "Generation", "Internal", "InvalidArgument", "LimitExceeded", "Load", "ModelInfo", "NotFound", "Overloaded",
    "PermissionDenied", "Prompt", "Sample", "Score", "ServerInfo", "ServiceError", "SettingsError", "Stream",
    "StructuredOutputs", "TrainSequence", "Unauthenticated", "Unavailable", "Unimplemented", "Usage", "Violation",
]  # fmt: skip
