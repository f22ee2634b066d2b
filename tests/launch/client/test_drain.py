"""`tp-decoders drain` over a real server: it takes nothing more, and what is open is ended after the grace time."""

from __future__ import annotations

import pytest

from cluster.frontend.frontend import Frontend, State
from launch.main import main
from tests.cluster.frontend.fakes import FakeEngine
from tests.launch.client.test_status import at_a_server


def test_a_server_is_drained(capsys: pytest.CaptureFixture[str]) -> None:
    def act(address: str, frontend: Frontend) -> State:
        assert main(["drain", "--address", address, "--grace", "0.1"]) == 0
        assert f"{address} takes nothing more and ends; 0 requests were ended after 0.1 s" in capsys.readouterr().out
        return frontend.state

    assert at_a_server(FakeEngine(), act) is not State.SERVING


@pytest.mark.parametrize("grace", ["-1", "inf", "nan"])
def test_a_grace_time_that_is_none_is_refused(grace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain", "--grace", grace]) == 2
    assert "give seconds from 0 on" in capsys.readouterr().err
