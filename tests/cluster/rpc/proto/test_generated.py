"""The committed protocol code is what the .proto files generate, and says what the design promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.message import Message

from cluster.rpc.protoc import ROOT, generate
from tp_decoders.protocol import inference_pb2 as pb

DIRECTORIES = (ROOT / "tp_decoders/protocol", ROOT / "tp_decoders/convert")


def test_generating_again_gives_the_committed_files(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    generate(tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*"))
    committed = sorted(path.relative_to(ROOT) for folder in DIRECTORIES for path in folder.glob("*_pb2*.py*"))
    assert made == committed and len(made) == 11
    for path in made:
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), f"{path}: run python -m cluster.rpc.protoc"


@pytest.mark.parametrize(
    ("message", "names"),
    [
        (pb.GenerateRequest, "request_id prompts sampling stopping response priority adapter"),
        (pb.Prompt, "text token_ids fim"),
        (
            pb.SamplingParams,
            "temperature top_k top_p min_p seed n repetition_penalty presence_penalty frequency_penalty logit_bias "
            "allowed_token_ids bad_words beam",
        ),
        (
            pb.StoppingCriteria,
            "max_new_tokens min_new_tokens stop_sequences stop_token_ids ignore_eos include_stop_sequence",
        ),
        (pb.ResponseOptions, "logprobs prompt_logprobs token_bytes echo timings logprobs_temperature"),
        (pb.GenerateResult, "prompt_index status prompt_tokens samples"),
        (
            pb.Sample,
            "index text token_ids logprobs top_logprobs finish_reason stop_sequence weight_version score",
        ),
        (
            pb.GenerateChunk,
            "prompt_index sample_index text token_ids logprobs finish_reason weight_version timings",
        ),
        (pb.ScoreRequest, "sequences temperature"),
        (pb.ScoreResult, "sequence_index status token_ids logprobs weight_version"),
    ],
)
def test_messages_have_the_promised_fields(message: type[Message], names: str) -> None:
    assert set(names.split()) <= {field.name for field in message.DESCRIPTOR.fields}


def test_every_scalar_whose_default_is_not_zero_tells_unset_from_zero() -> None:
    unset_matters: dict[type[Message], tuple[str, ...]] = {
        pb.SamplingParams: ("temperature", "top_k", "top_p", "min_p", "seed", "n", "repetition_penalty"),
        pb.StoppingCriteria: ("max_new_tokens",),
        pb.ResponseOptions: ("logprobs", "prompt_logprobs", "logprobs_temperature"),
        pb.ScoreRequest: ("temperature", "top_logprobs"),
    }
    for message, names in unset_matters.items():
        assert all(message.DESCRIPTOR.fields_by_name[name].has_presence for name in names)
