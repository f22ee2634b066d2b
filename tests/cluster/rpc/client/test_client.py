"""tp_decoders.client, blocking, against a real server on a real port: answers, faults, threads, forks."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from cluster.access.access_config import Security
from tests.cluster.access.token_files import entry, secret_file
from tests.cluster.frontend.fakes import CODEC, ENDLESS, LASTING, tokens_of
from tests.cluster.rpc.client.live_server import Live, live
from tp_decoders import client as library
from tp_decoders.client import Access, AsyncClient, Beam, Client, FinishReason, GenerateOptions, Generation, Stream
from tp_decoders.client.values.requests import generate_request, option_names

ROOT = Path(__file__).resolve().parents[4]
TOKEN = "a-token-of-sufficient-length-0123"


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[Client]:
    with Client(server.address) as made:
        yield made


def wait_until(what: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_an_answer_is_a_frozen_value_with_everything_in_it(client: Client) -> None:
    answer = client.generate([1, 2], max_new_tokens=7, seed=4, n=2, logprobs=2, token_bytes=True, timings=True)
    assert answer.token_ids == tuple(tokens_of([1, 2], 4, 0, 7))
    assert answer.text == CODEC.tokenizer.decode(answer.token_ids)
    assert answer.samples[1].token_ids == tuple(tokens_of([1, 2], 4, 1, 7)) and answer.samples[1].index == 1
    assert answer.finish_reason is FinishReason.LENGTH and answer.seed == 4 and answer.used["max_new_tokens"] == 7
    assert answer.usage.prompt_tokens == 2 and answer.usage.completion_tokens == 14 and answer.usage.total_tokens == 16
    assert len(answer.logprobs) == len(answer.sample.top_logprobs) == len(answer.sample.token_bytes) == 7
    assert answer.sample.timings is not None and answer.sample.timings.total > 0 and answer.request_id
    assert answer.sample.score is None and answer.error is None
    with pytest.raises(FrozenInstanceError):
        answer.prompt_tokens = 3  # type: ignore[misc]
    again = pickle.loads(pickle.dumps(answer))
    assert again == answer and isinstance(again, Generation)


def test_chunks_of_a_stream_add_up_to_the_answer(client: Client) -> None:
    options: GenerateOptions = {"max_new_tokens": 20, "seed": 5, "logprobs": 0}
    with client.stream("ab é", **options) as stream:
        chunks = list(stream)
    whole = client.generate("ab é", **options)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    assert tuple(value for chunk in chunks for value in chunk.logprobs) == whole.logprobs
    first, last = chunks[0].prompt, chunks[-1]
    assert first is not None and first.request_id == stream.request_id and first.used["seed"] == 5 and first.has_text
    assert last.finish_reason is FinishReason.LENGTH and all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert chunks == pickle.loads(pickle.dumps(chunks))


def test_of_a_batch_each_prompt_has_its_answer_or_its_error(client: Client) -> None:
    good, bad = client.generate_batch([[1], [99]], max_new_tokens=3, seed=1)
    assert good.token_ids == tuple(tokens_of([1], 1, 0, 3)) and good.error is None
    assert isinstance(bad.error, library.InvalidArgument) and not bad.samples and bad.error.request_id == bad.request_id
    with pytest.raises(library.InvalidArgument):
        bad.text  # noqa: B018
    chunks = list(client.stream_batch([[1], [99]], max_new_tokens=3, seed=1))
    assert [type(chunk.error) for chunk in chunks if chunk.prompt_index == 1] == [library.InvalidArgument]
    assert [token for chunk in chunks for token in chunk.token_ids] == tokens_of([1], 1, 0, 3)
    (score,) = client.score([[1, 2, 3]], top_logprobs=1)
    assert len(score.logprobs) == len(score.top_logprobs) == 2 and score.request_id
    assert client.detokenize(client.tokenize(["ab", ""])) == ["ab", ""]


def test_what_the_server_says_of_itself(client: Client) -> None:
    info = client.server_info()
    assert info.state == "serving" and info.ready and info.parallelism.tensor_parallel_size == 1
    assert client.model_info().vocab_size == 13 and client.load().kv_blocks_total >= 0
    assert client.health("tp_decoders.v1.Inference") == "SERVING" and client.abort(["nobody"]) == 0


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([1], {"max_tokens": 3}, "max_tokens is no option"),
        ([1], {"temprature": 0}, "temprature is no option; is temperature meant?"),
        ([1], {"stop_sequences": "end"}, "stop_sequences is one str; give a list"),
        ([1], {"top_k": 1.5}, "top_k is 1.5"),
        ([1], {"seed": -(1 << 70)}, "seed is -"),
        ([-1], {}, r"prompt.token_ids is"),
        (["a"], {}, r"prompt.token_ids is"),
        (b"a", {}, "prompt is bytes"),
        ("\ud800", {}, r"prompt.text is"),
        ([1], {"timeout": 0}, "timeout is 0; give seconds above 0"),
        ([1], {"beam": Beam(width=2, early_stopping="YES")}, "beam is"),  # type: ignore[arg-type]
    ],
)
def test_what_no_message_can_hold_is_refused_here_by_name(
    client: Client, prompt: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(library.SettingsError, match=words):
        client.generate(prompt, **options)


def test_a_grammar_is_given_as_python_has_it() -> None:
    given: list[Any] = [
        {"json": {"type": "object"}}, {"choice": ["a", "b"]}, {"regex": "a+", "disable_any_whitespace": True},
    ]  # fmt: skip
    as_json, choice, regex = (generate_request([], {"structured_outputs": each}).sampling for each in given)
    assert as_json.structured_outputs.json == '{"type": "object"}'
    assert list(choice.structured_outputs.choice.texts) == ["a", "b"]
    assert regex.structured_outputs.regex == "a+" and regex.structured_outputs.disable_any_whitespace
    for wrong in ({"choice": "ab"}, {"schema": "{}"}):
        with pytest.raises(library.SettingsError, match="structured_outputs is"):
            generate_request([], {"structured_outputs": wrong})


def test_one_text_is_no_batch(client: Client) -> None:
    with pytest.raises(library.SettingsError, match="prompts is one prompt"):
        client.generate_batch("abc")


def test_the_servers_words_fields_and_the_calls_id_are_in_the_error(client: Client) -> None:
    with pytest.raises(library.InvalidArgument) as caught:
        client.generate([1], temperature=-1, request_id="mine-1")
    error = caught.value
    assert error.request_id == "mine-1" and error.words and str(error).endswith(error.words)
    assert error.violations[0].field == "sampling.temperature" and error.reason == "INVALID_FIELDS"
    assert error.retry_after is None and isinstance(error, library.ServiceError | library.ClientError)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and again.violations == error.violations


def test_a_deadline_is_an_error_of_its_own_or_the_servers_own_end_and_frees_the_request() -> None:
    with live(engine={"limits": ENDLESS}) as server, Client(server.address, timeout=0.1) as hasty:
        for number in range(6):
            try:
                chunks = list(hasty.stream([number], max_new_tokens=LASTING))
            except TimeoutError as error:
                assert isinstance(error, library.DeadlineExceeded)
            else:  # the server was first
                assert chunks[-1].finish_reason is FinishReason.DEADLINE
        wait_until(lambda: server.open_requests() == 0)


def test_a_stream_that_is_left_is_cancelled_at_the_server() -> None:
    def leave_block(client: Client) -> None:
        with client.stream([1], max_new_tokens=LASTING) as stream:
            next(stream)

    def forget(client: Client) -> None:
        next(client.stream([1], max_new_tokens=LASTING))

    def break_out(client: Client) -> None:
        for _ in client.stream([1], max_new_tokens=LASTING):
            break

    def close_elsewhere(client: Client) -> None:
        stream: Stream = client.stream([1], max_new_tokens=LASTING)
        threading.Timer(0.03, stream.close).start()
        assert list(stream)
        assert list(stream) == []

    with live(engine={"limits": ENDLESS}) as server, Client(server.address) as client:
        for leave in (leave_block, forget, break_out, close_elsewhere):
            leave(client)
            wait_until(lambda: server.open_requests() == 0)
        assert client.generate([1], max_new_tokens=1, seed=1).token_ids


def test_a_full_server_is_asked_again_when_it_says_so() -> None:
    with live(max_open_requests=1) as server, Client(server.address) as client:
        with client.stream([1], max_new_tokens=250) as stream:
            next(stream)
            with Client(server.address, overload_retries=0) as once, pytest.raises(library.Overloaded) as full:
                once.generate([2], max_new_tokens=1)
            assert full.value.retry_after and full.value.reason == "QUEUE_FULL"
            assert client.generate([2], seed=0, max_new_tokens=2).token_ids == tuple(tokens_of([2], 0, 0, 2))


def test_a_token_is_brought_or_the_call_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = secret_file(tmp_path / "tokens.toml", entry("us", TOKEN, ["generate"]))
    mine = secret_file(tmp_path / "token", TOKEN)
    with live(security=Security(token_file=tokens)) as server:
        for access, error in (
            (Access(), library.Unauthenticated),
            (Access(token="another-token-of-that-length-01"), library.Unauthenticated),
        ):
            with Client(server.address, access) as client, pytest.raises(error):
                client.generate([1], max_new_tokens=1)
        monkeypatch.setenv("TP_DECODERS_ADDRESS", f"grpc://{server.address}")
        monkeypatch.setenv("TP_DECODERS_TOKEN_FILE", mine)
        with Client() as client:
            assert client.generate([1], max_new_tokens=1).token_ids
            with pytest.raises(library.PermissionDenied):
                client.drain(1.0)
        assert TOKEN not in repr(Access(token=TOKEN))


def test_a_stream_goes_on_at_the_next_server_without_a_lost_or_doubled_token() -> None:
    with live(engine={"step_seconds": 0.01}) as server, Client(server.address) as client:
        chunks = []
        for chunk in client.stream([1, 2], max_new_tokens=60, seed=4, logprobs=0):
            chunks.append(chunk)
            if len(chunks) in (10, 30):
                server.lose()
                threading.Timer(0.2, server.come_back).start()
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        assert tokens == tokens_of([1, 2], 4, 0, 60)
        assert "".join(chunk.text for chunk in chunks) == CODEC.tokenizer.decode(tokens)
        assert len([value for chunk in chunks for value in chunk.logprobs]) == 60
        threading.Timer(0.05, server.lose).start()
        threading.Timer(0.3, server.come_back).start()
        assert client.generate([5], max_new_tokens=60, seed=1).token_ids == tuple(tokens_of([5], 1, 0, 60))
        server.lose()
        began = time.monotonic()
        with Client(server.address) as stranger, pytest.raises(library.Unavailable):
            stranger.generate([1])
        with pytest.raises(library.DeadlineExceeded):
            client.generate([1], timeout=0.3)
        assert time.monotonic() - began < 10
        server.come_back()


def test_sixteen_threads_share_one_client(client: Client) -> None:
    def work(index: int) -> bool:
        for turn in range(6):
            seed = 100 * index + turn
            wanted = tuple(tokens_of([1, 2], seed, 0, 12))
            streamed = tuple(t for c in client.stream([1, 2], seed=seed, max_new_tokens=12) for t in c.token_ids)
            if not wanted == streamed == client.generate([1, 2], seed=seed, max_new_tokens=12).token_ids:
                return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))


def _in_the_child(client: Client, pipe: Any) -> None:
    try:
        pipe.send(client.generate([1, 2], seed=3, max_new_tokens=5, timeout=20))
        client.close()
    except BaseException as error:
        pipe.send(error)
    finally:
        os._exit(0)


def test_after_a_fork_parent_and_child_go_on(client: Client) -> None:
    wanted = client.generate([1, 2], seed=3, max_new_tokens=5)
    for _ in range(3):
        here, there = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=_in_the_child, args=(client, there))
        child.start()
        assert here.poll(30), "the child hangs"
        answer = here.recv()
        child.join(10)
        assert isinstance(answer, Generation) and answer.samples == wanted.samples, answer
        assert client.generate([1, 2], seed=3, max_new_tokens=5).samples == wanted.samples


def test_a_closed_client_and_a_wrong_address_say_so() -> None:
    client = Client("127.0.0.1:1")
    client.close()
    with pytest.raises(library.SettingsError, match="is closed"):
        client.server_info()
    for address, words in (
        ("https://a:1", "speaks gRPC"), ("nowhere", "host:port"), ("::1:50", "in brackets"), ("a:0", "write host"),
    ):  # fmt: skip
        with pytest.raises(library.SettingsError, match=words):
            Client(address)
    with socket.socket() as quiet:  # nobody accepts here
        quiet.bind(("127.0.0.1", 0))
        with Client(f"127.0.0.1:{quiet.getsockname()[1]}") as lost:
            with pytest.raises(library.Unavailable, match="no server answered within 0.3 s"):
                lost.ready(0.3)


def test_both_clients_have_the_same_calls_and_every_option_is_typed() -> None:
    names = {name for name in vars(Client) if not name.startswith("_")}
    assert names == {name for name in vars(AsyncClient) if not name.startswith("_")}
    for name in names:
        blocking, other = (inspect.signature(getattr(kind, name)) for kind in (Client, AsyncClient))
        assert list(blocking.parameters.values()) == list(other.parameters.values()), name
    assert sorted(GenerateOptions.__annotations__) == option_names()


def test_importing_it_brings_neither_torch_nor_ray_nor_the_rest_of_this_project() -> None:
    code = "import sys, tp_decoders.client; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "ray", "transformers", "tokenizers", "numpy", "msgspec", "yaml", "aiohttp"}
    assert not loaded & {"parallel", "cluster", "launch"} and {"tp_decoders", "grpc"} <= loaded
