"""Which file system a checkpoint lies on, as the kernel lists them; and where each rank may fetch it for itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tp_decoders.files import filesystem

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt rw - nfs4 server:/export rw
31 30 0:41 / /mnt/my\\040bucket rw - fuse.gcsfuse bucket rw
"""


@pytest.fixture(autouse=True)
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    monkeypatch.setattr(filesystem, "MOUNTS", tmp_path / "mountinfo")


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/models/x", "ext4"), ("/mnt/x", "nfs4"), ("/mnt", "nfs4"), ("/mnt/my bucket/x", "fuse.gcsfuse"),
     ("/mnt/my bucket", "fuse.gcsfuse"), ("/mntx", "ext4")],
)  # fmt: skip
def test_a_path_has_the_kind_of_the_innermost_mount(path: str, kind: str) -> None:
    assert filesystem.kind_of(Path(path)) == kind


def test_only_of_mounts_in_user_space_a_cache_is_advised() -> None:
    assert filesystem.advice(Path("/mnt/x")) is None and filesystem.advice(Path("/models/x")) is None
    said = filesystem.advice(Path("/mnt/my bucket/x"))
    assert said and "fuse.gcsfuse" in said and "placement.weights_cache" in said


def test_where_nothing_is_known_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "MOUNTS", Path("/nowhere"))
    assert filesystem.kind_of(Path("/models")) == "" and filesystem.advice(Path("/models")) is None
