"""The bits of the six families, as digests: of what a forward, greedy generation and training give.

    python -m tests.cluster.stored_digests            prints them as JSON
    python -m tests.cluster.stored_digests --dtypes bfloat16
    python -m tests.cluster.stored_digests --write    rewrites tests/data/digests.json, after a change that is meant

Run at a change of numerics only, and say so in its message: the file is what every machine is held to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from parallel.native.compiled import library
from tests.cluster.engine.tiny_models import CONFIGS
from tests.cluster.exact_models import exact_model, greedy, log_probs, logits, training
from tp_decoders.model.decoder import Decoder

FILE = Path(__file__).resolve().parents[1] / "data" / "digests.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NEW_TOKENS, STEPS = 50, 20
Digests = dict[str, dict[str, str]]


def digests(dtypes: Iterable[str] = DTYPES) -> Digests:
    """By family and type, of each thing computed."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            f"{family} {name}": _digests(exact_model(family, Path(folder, family), DTYPES[name]))
            for family in CONFIGS
            for name in dtypes
        }


def stored() -> Digests:
    """Those of the file."""
    found: Digests = json.loads(FILE.read_text())
    return found


def _digests(model: Decoder) -> dict[str, str]:
    found = {
        "logits": _digest(logits(model)),
        "log_probs": _digest(log_probs(model)),
        "greedy": _hash(repr(greedy(model, NEW_TOKENS)).encode()),
        "steps": _hash(b"".join(struct.pack("<2d", *step) for step in training(model, STEPS))),
    }
    return found | {"trained": _digest(*(parameter for _, parameter in sorted(model.named_parameters())))}


def _digest(*tensors: torch.Tensor) -> str:
    """Of their numbers; bfloat16 is widened, which loses nothing."""
    return _hash(b"".join(tensor.detach().float().contiguous().numpy().tobytes() for tensor in tensors))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the file")
    parser.add_argument("--flags", default="", help="for the kernels' compiler, such as --flags=-O1")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of these, without --write")
    given = parser.parse_args()
    library.configure(flags=given.flags.split())
    if given.write:
        FILE.write_text(json.dumps(digests(), indent=1) + "\n")
    else:
        print(json.dumps(digests(given.dtypes), indent=1))


if __name__ == "__main__":
    main()
