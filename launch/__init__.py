"""The command line: the only place that reads arguments, the environment and YAML.

Its neighbours have generic names, and PYTHONPATH may lead to others of that name (a training project's `parallel.py`):
where it does, the folder that this package lies in comes first.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _is_ours(package: str) -> bool:
    found = PathFinder.find_spec(package)
    return found is not None and found.origin is not None and Path(found.origin).resolve().is_relative_to(ROOT)


if not all(map(_is_ours, ("parallel", "tp_decoders", "cluster"))):
    sys.path.insert(0, str(ROOT))
