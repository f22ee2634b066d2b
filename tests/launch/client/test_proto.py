"""The written .proto files are whole: protoc compiles them with nothing else at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.main import main


def test_protoc_reads_what_was_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc")
    out, code = tmp_path / "protos", tmp_path / "code"
    assert main(["proto", "--out", str(out)]) == 0
    written = [Path(line) for line in capfd.readouterr().out.splitlines()]
    assert len(written) == 5 and out / "google/rpc/status.proto" in written
    code.mkdir()
    well_known = Path(protoc.__file__).parent / "_proto"
    flags = [f"-I{out}", f"-I{well_known}", f"--python_out={code}", f"--grpc_python_out={code}"]
    assert protoc.main(["protoc", *flags, *map(str, written)]) == 0
    assert (code / "tp_decoders/protocol/training_pb2_grpc.py").is_file()


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["proto", "--out", str(tmp_path / "file")]) == 2
    assert "give a folder" in capfd.readouterr().err
