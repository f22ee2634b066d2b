"""`serve --task`: what is wrong with it is said before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from launch.main import main

GPT2 = {"vocab_size": 31, "n_positions": 32, "n_embd": 24, "n_layer": 1, "n_head": 3}


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("GPT2ForTokenClassification", [], "made for token-classification and holds that head; add --task token-class"),
        ("GPT2LMHeadModel", ["--task", "translation"], "task 'translation' is unknown; choose one of causal-lm, "),
        ("GPT2DoubleHeadsModel", [], "add --task double-heads"),
    ],
)
def test_a_task_that_does_not_fit_the_checkpoint_is_refused(
    kind: str, options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    getattr(transformers, kind)(transformers.GPT2Config(**GPT2)).save_pretrained(tmp_path)
    assert main(["serve", "--model", str(tmp_path), "--port", "0", *options]) == 2
    assert words in capsys.readouterr().err
