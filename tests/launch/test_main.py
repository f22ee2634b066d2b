"""The command line: help that shows an example, one-line errors, exit status 2 for bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
CALL = f'import sys; sys.path.append("{ROOT}"); from launch.main import main; sys.exit(main(["init", "x", "y"]))'
NANO = str(ROOT / "tests/data/gpt-nano-sort")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"example: tp-decoders {command}" in " ".join(capsys.readouterr().out.split())


def test_help_lists_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ") and line[4:5].strip()}
    assert set(COMMANDS) <= listed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_wait_for_torch_or_ray(command: str) -> None:
    code = (
        "import sys\nfrom launch.main import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("arguments", [[], ["sever"], ["serve"], ["convert", "onlyone"], ["bench"]])
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "tiny-gpt", "out"], "no preset 'tiny-gpt' in configs/models; choose one of ['gpt-neox-20b'"),
        (["convert", "nowhere", "out"], "nowhere has no config.json; give the folder of a Hugging Face checkpoint"),
        (
            ["convert", "nowhere", "out", "--max-shard-size", "5 bananas"],
            "--max-shard-size is '5 bananas'; write a number",
        ),
        (["serve", "--model", "nowhere"], "nowhere has no config.json"),
        (["serve", "--model", "m", "--preset", "smal"], "no preset 'smal' in configs/engine; choose one of"),
        (
            ["serve", "--model", "m", "engine.max_sequence=8"],
            "command line.engine: unknown ['max_sequence']; EngineConfig",
        ),
        (
            ["serve", "--model", "m", "engine.max_sequences"],
            "'engine.max_sequences' is not an override; write name.name",
        ),
        (["serve", "--model", "m", "--tp", "0"], "parallel.tp is 0; it must be at least 1"),
        (["serve", "--model", "loop"], "cannot read"),
        (["serve", "--model", "m", "frontend.max_n=0"], "frontend.max_n is 0; give a number above 0"),
        (["serve", "--model", "m", "limits.write_seconds=-1"], "limits.write_seconds is -1; give a number above 0"),
        (["serve", "--model", "m", "server.drain_seconds=-1"], "server.drain_seconds is -1; give seconds, 0 or more"),
        (["serve", "--model", "m", "placement.start_timeout_s=0"], "placement.start_timeout_s is 0; give a number"),
        (["serve", "--model", "m", "ray.num_cpus=0"], "ray.num_cpus is 0; give at least 1"),
        (["serve", "--model", "m", "engine.attention_backend=foo"], "engine.attention_backend is 'foo'; choose one of"),
        (["serve", "--model", "m", "engine.attention_backend=flash"], "is 'flash', which does not run on cpu; choose"),
        (["serve", "--model", "m", "--tls-cert", "c.pem"], "TlsConfig needs ['server.tls.key']"),
        (["serve", "--model", NANO, "--tp", "4096"], "4096 ranks need 4096 CPU cores on one node, the cluster has"),
        (["train", "--config", "laptop"], "TrainConfig needs ['out']; no preset or option gives them: add out=..."),
        (["train", "--config", "deep.yaml"], "deep.yaml is nested too deeply to hold settings"),
        (["train", "--config", "laptop", "out=o", "model=loop"], "cannot read"),
        (["train", "--config", "laptop", "out=o", "corpus.path=a.txt"], "a.txt is looked for below the current folder"),
        (["train", "--config", "laptop", "out=o", "schedule.warmup_steps=-1"], "schedule.warmup_steps -1 is negative"),
        (["train", "--config", "laptop", "out=o", "optimizer.beta1=2"], "optimizer.beta1 2.0 is outside [0, "),
        (["train", "--config", "laptop", "out=o", "corpus.split.unit=x"], "corpus.split.unit 'x' is unknown; choose"),
        (["train", "--config", "laptop", "out=o", "lora.rank=0"], "lora: lora rank 0; give at least 1"),
        (["train", "--config", "laptop", "out=o", "samples.prompts=a"], "it must be a list of texts, as in [a, b]"),
        (["train", "--config", "laptop", "out=o", "metrics_port=70000"], "metrics_port is 70000; give 1 to 65535"),
        (["train", "--config", "laptop", "out=o", "parallel.tp=64"], "64 ranks need 64 CPU cores on one node"),
        (["plan", "--model", "gpt2", "--gpus", "2", "--gpu-memory", "9GB", "--sequence", "0"], "--sequence is 0; give"),
        (["plan", "--model", "gpt2", "--gpus", "0", "--gpu-memory", "9GB"], "--gpus is 0; give at least 1"),
        (["token", "a", "--roles", "generate", "--add-to", "."], "--add-to . cannot be read"),
        (["token", "a", "--roles", "generate", "--add-to", "no/t"], "--add-to no/t cannot be written: No such file"),
        (["convert", NANO, "out", "--tokenizer", "deep.yaml"], "deep.yaml is nested too deeply"),
        (["serve", "--model", "m", "--dp", "2", "--train"], "training.enabled with parallel.dp=2"),
        (["serve", "--model", "m", "--save-root", "x"], "training.save_root is set but training is off; add --train"),
        (["generate"], "give the prompt either as text or with --token-ids"),
        (["generate", "--token-ids", "1,x"], "--token-ids is '1,x'; write numbers"),
        (["bench", "serve", "--streams", "0"], "--streams is 0; give at least 1"),
        (["generate", "hello", "--beam-groups", "2"], "--beam-groups and --diversity-penalty need --beams"),
        (["generate", "hello", "--fim-order", "suffix"], "--fim-order says in which order --suffix is read"),
        (["generate", "--token-ids", "1", "--suffix", "x"], "--suffix goes with a prompt of text"),
        (["generate", "hello", "--address", "nonsense"], "--address is 'nonsense'; write host:port"),
        (["generate", "hello", "--address", "http://localhost:50051"], "write host:port, as in localhost:50051"),
        (["status", "--address", "localhost:0"], "--address is 'localhost:0'; write host:port"),
        (["status", "--address", "::1:50051"], "write an IPv6 address in brackets, as in [::1]:50051"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("deep.yaml").write_text("[" * 100_000)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1, error


def test_a_server_that_is_not_there_is_status_1_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hello", "--address", "127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert "127.0.0.1:1" in error
    assert error.count("\n") == 1, error


def test_overrides_may_stand_anywhere_among_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["serve", "engine.kv_blocks=8", "--model", "nowhere", "engine.block_size=16", "--tp", "1", "server.port=0"]
    assert main(given) == 2
    assert "nowhere has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["nonsense", "--nonsense=1"])
def test_what_is_no_override_is_refused_by_name(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--model", "nowhere", "engine.kv_blocks=8", "--tp", "1", word])
    assert ended.value.code == 2
    assert f"unrecognized arguments: {word}; see tp-decoders serve --help" in capsys.readouterr().err


def test_a_terminal_without_the_characters_is_shown_their_numbers() -> None:
    code = "import sys; from launch.main import main\ntry: main(['--version'])\nexcept SystemExit: print('Ж😀')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("\\u0416\\U0001f600\n")


def test_a_text_that_is_none_in_this_encoding_is_one_line() -> None:
    for words, given, what in (
        ((b"caf\xe9",), b"", b"the prompt"),
        ((b"-",), b"caf\xe9", b"the prompt"),
        ((b"a", b"--suffix", b"caf\xe9"), b"", b"--suffix"),
        ((b"a", b"--stop", b"b", b"--stop", b"caf\xe9"), b"", b"--stop"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "launch", "generate", *words, "--address", "127.0.0.1:9"], cwd=ROOT, input=given,
            env={**os.environ, "LC_ALL": "C.UTF-8", "PYTHONUTF8": "0"}, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1
        assert what + b" is not in this terminal's encoding (utf-8)" in done.stderr


def test_a_closed_standard_input_and_a_folder_that_is_gone_are_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    for script, words in (
        (f"exec {sys.executable} -m launch generate - <&-", b"standard input, which is closed"),
        (f"mkdir {gone}; cd {gone}; rmdir {gone}; exec {sys.executable} -c '{CALL}'", b"does not exist any more"),
    ):
        done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count(b"\n") == 1, done.stderr


def test_foreign_packages_of_our_names_on_the_path_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "parallel.py").write_text("raise SystemExit('a foreign parallel')")
    (tmp_path / "cluster").mkdir()  # a folder without __init__.py is a package, too
    path = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = f"import sys; sys.path.append({str(ROOT)!r}); from launch.main import main; main(['convert', 'no', 'out'])"
    for folder in (tmp_path, ROOT):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=path, capture_output=True, text=True, check=False
        )
        assert "no has no config.json" in done.stderr, done.stderr


def test_what_the_surroundings_refuse_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert main(["init", "tiny-gpt2", str(tmp_path / "taken" / "below")]) in (1, 2)
    error = capsys.readouterr().err
    assert "taken" in error and error.count("\n") == 1
