"""Records that survive a kill, TensorBoard's files, and the picture of the loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cluster.training.job.loss_plot import can_plot, plot_loss, running_mean
from cluster.training.job.run_metrics import RecordReader, Records, TensorBoard, check_tensorboard, read_records
from parallel.errors import ConfigError


def test_a_resumed_file_is_cut_back_to_its_step_and_half_a_line_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st', encoding="utf-8")
    records = Records(path, step=2)
    records.write({"step": 3, "text": "猫"})
    assert read_records(path) == [{"step": 1}, {"step": 2}, {"step": 3, "text": "猫"}]
    records.close()
    assert "猫" in path.read_text(encoding="utf-8")


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    records = Records(tmp_path / "samples.jsonl", step=0)
    records.write({"step": 1, "text": "a\u2028b\x85c\x0cd\re"})
    records.close()
    assert read_records(tmp_path / "samples.jsonl") == [{"step": 1, "text": "a\u2028b\x85c\x0cd\re"}]


def test_a_reader_sees_each_line_once_and_all_of_a_file_that_was_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = RecordReader(path)
    assert reader.fresh() == []
    path.write_text('{"step": 1}\n{"st', encoding="utf-8")
    assert reader.fresh() == [{"step": 1}] and reader.fresh() == []
    with path.open("a", encoding="utf-8") as file:
        file.write('ep": 2}\n')
    assert reader.fresh() == [{"step": 2}]
    Records(path, step=1).close()
    assert reader.fresh() == [{"step": 1}]


def test_without_tensorboard_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match="set tensorboard=false"):
        check_tensorboard()
    with pytest.raises(ConfigError, match="pip install"):
        TensorBoard(tmp_path, 0)


def test_the_loss_is_drawn_with_the_held_out_one_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [{"step": step, "loss": 10 / step} for step in range(1, 40)]
    plain = plot_loss(records, tmp_path / "plain.png", "run").read_bytes()
    records[19] |= {"eval_loss": 3.0}
    held_out = plot_loss(records, tmp_path / "held-out.png", "run").read_bytes()
    assert plain.startswith(b"\x89PNG") and held_out.startswith(b"\x89PNG") and plain != held_out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held-out.png", "plain.png"]


def test_without_matplotlib_nothing_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not can_plot()


def test_a_running_mean_starts_with_what_there_is() -> None:
    assert running_mean([4.0, 2.0, 6.0, 1.0], 2) == [4.0, 3.0, 4.0, 3.5]
    assert running_mean([], 3) == [] and json.dumps(running_mean([1.0], 3)) == "[1.0]"
