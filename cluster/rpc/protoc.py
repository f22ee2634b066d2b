"""Regenerates the Python code of the .proto files: `python -m cluster.rpc.protoc [directory]`.

Runs protoc from the repository's root, so that the generated imports (`from tp_decoders.protocol import ...`) need no
patching. The generated files are committed; a test regenerates them and compares. Needs grpcio-tools (a development
dependency).
"""

from __future__ import annotations

import sys
from pathlib import Path

from parallel.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
THIRD_PARTY = ROOT / "tp_decoders" / "protocol" / "third_party"
"""Protocols of others that ours import, as a client in any language needs them: google.rpc (Apache-2.0, googleapis)."""
PROTOS = tuple(f"tp_decoders/protocol/{name}.proto" for name in ("inference", "control", "training"))
FILE_PROTOS = ("tp_decoders/convert/tensorflow_index.proto",)
"""Messages that files hold: no services."""


def generate(directory: Path = ROOT) -> None:
    """Write *_pb2.py and *_pb2.pyi, and of services *_pb2_grpc.py, below `directory`."""
    try:
        import grpc_tools
        from grpc_tools import protoc
    except ImportError as error:
        raise ConfigError(f"cannot generate code: {error}; install grpcio-tools") from error
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    includes = [f"-I{ROOT}", f"-I{THIRD_PARTY}", f"-I{well_known}"]
    messages = [f"--python_out={directory}", f"--pyi_out={directory}"]
    for protos, outputs in ((PROTOS, [*messages, f"--grpc_python_out={directory}"]), (FILE_PROTOS, messages)):
        status = protoc.main(["protoc", *includes, *outputs, *(str(ROOT / proto) for proto in protos)])
        if status:
            raise ConfigError(f"protoc ended with status {status} on {', '.join(protos)}; its messages are above")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
