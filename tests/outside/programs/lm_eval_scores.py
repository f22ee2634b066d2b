"""lm-eval's local-completions against a running server, and its `hf` on the same checkpoint and task.

    lm_eval_scores.py http://127.0.0.1:8000 CHECKPOINT [SCORES.json]

The task is local: questions of tests/data/text, whose right continuation is the line's own. The accuracies of both must
be equal; each log-likelihood over HTTP goes to SCORES.json with its request, to be held against what `Score` says.
"""

# mypy: ignore-errors

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path

TEXT = Path(__file__).resolve().parents[2] / "data" / "text" / "tinyshakespeare.txt"
COUNT = 40
TASK = """task: next_line
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/next_line.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def rows() -> list[dict[str, object]]:
    """A line of the play and three that may follow it, one of which does."""
    lines = [line for line in TEXT.read_text(encoding="utf-8").splitlines() if len(line) > 30]
    found = []
    for number in range(COUNT):
        at = 211 * number
        choices = ["\n" + lines[at + 1 + 97 * wrong] for wrong in range(3)]
        answer = number % 3
        choices[0], choices[answer] = choices[answer], choices[0]
        found.append({"question": lines[at], "choices": choices, "answer": answer})
    return found


def evaluated(model: str, arguments: str, folder: Path) -> tuple[float, list[dict]]:
    out = folder / model
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", "next_line",
               "--include_path", str(folder), "--output_path", str(out), "--log_samples",
               "--batch_size", "1", "--device", "cpu"]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    print("\n".join(line for line in ran.stdout.splitlines() if line.startswith("|")))
    (samples,) = out.rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    return sum(one["acc"] for one in found) / len(found), sorted(found, key=lambda one: one["doc_id"])


def main(base: str, checkpoint: str, out: str | None = None) -> None:
    print(f"lm-eval {version('lm-eval')}")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "next_line.jsonl").write_text("\n".join(map(json.dumps, rows())))
        (folder / "next_line.yaml").write_text(TASK.format(folder=folder))
        name = json.load(urllib.request.urlopen(f"{base}/v1/models", timeout=20))["data"][0]["id"]
        more = "tokenizer_backend=remote,num_concurrent=4,max_length=127"
        ours, samples = evaluated("local-completions", f"base_url={base}/v1/completions,model={name},{more}", folder)
        theirs, others = evaluated("hf", f"pretrained={checkpoint},dtype=float32,max_length=127", folder)
    assert ours == theirs, (ours, theirs)
    pairs = [
        (request, float(answer[0]), float(other[0]))
        for one, two in zip(samples, others, strict=True)
        for request, answer, other in zip(
            one["arguments"].values(), one["filtered_resps"], two["filtered_resps"], strict=True
        )
    ]
    away = max(abs(a - b) / abs(b) for _, a, b in pairs)
    assert away < 1e-5, away
    print(f"accuracy {ours:.3f} over HTTP and with transformers")
    print(f"{len(pairs)} log-likelihoods, at most {away:.1e} apart")
    if out:
        scores = [[request["arg_0"], request["arg_1"], value] for request, value, _ in pairs]
        Path(out).write_text(json.dumps(scores))


if __name__ == "__main__":
    main(*sys.argv[1:])
