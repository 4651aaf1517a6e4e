"""`blt-train generate`: prompts from everywhere, files of prompts, and kills."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tests.blt_train.samples import byte_config, text_documents, write_patched

from blt_data import frame
from blt_model import ByteLM, Request, SamplingOptions, next_byte_entropy, pack_documents, quantize_int8
from blt_model.weights.native import model_fingerprint, save_model
from blt_patcher import EntropyScheme
from blt_train.cli import main
from blt_train.completions import PromptFile, complete_file, journal_of
from blt_train.exchange import export_model
from blt_train.generation import generator_of
from blt_train.inputs import architecture_of_config
from blt_train.models import OpenedModel, open_model
from blt_train.parallel.seeding import fresh_model


@pytest.fixture(scope="module")
def blt_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLT of two steps, with the entropy model that patched its data."""
    root = tmp_path_factory.mktemp("generate")
    scorer = fresh_model(architecture_of_config(byte_config(root, "any")), 0).eval()
    save_model(scorer, root / "scorer")
    documents = text_documents(30)
    entropies = [
        next_byte_entropy(scorer(pack_documents([np.append(frame(content), 0)])[0])).detach().numpy().astype("float16")
        for content in documents
    ]
    scheme = EntropyScheme(threshold=float(entropies[0].mean()))
    write_patched(
        root / "scored", documents, scheme, entropies=entropies, entropy_fingerprint=model_fingerprint(scorer)
    )
    arguments = ["debug-blt", f"run={root / 'run'}", f"data.train={root / 'scored'}", "schedule.total_steps=2"]
    result = run("launch", *arguments, f"entropy_model={root / 'scorer'}")
    assert result.exit_code == 0, result.output
    return root / "run"


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def write_prompts(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sample_rows(count: int) -> list[dict[str, Any]]:
    rng = random.Random(5)
    rows: list[dict[str, Any]] = []
    for index in range(count):
        row: dict[str, Any] = {"id": f"d{index}", "prompt": "".join(rng.choices("ab été\n", k=rng.randrange(20)))}
        if index % 3 == 1:
            row["max_new_bytes"] = rng.randrange(12)
        if index % 4 == 2:
            row |= {"temperature": 0.5, "seed": 9, "stop": ["a"]}
        rows.append(row)
    return rows


def test_prompts_come_from_the_command_line_a_file_or_stdin(blt_run: Path, tmp_path: Path) -> None:
    prompt = "the été ".encode()
    (tmp_path / "prompt.txt").write_bytes(prompt)
    options = ["--max-new-bytes", 12, "--device", "cpu"]
    told = run("generate", "--checkpoint", blt_run, "--prompt", prompt.decode(), *options)
    assert told.exit_code == 0, told.output
    assert told.stdout.startswith(prompt.decode())
    filed = run("generate", "--checkpoint", blt_run, "--prompt-file", tmp_path / "prompt.txt", *options)
    piped = run("generate", "--checkpoint", blt_run, "--prompt-file", "-", *options, stdin=prompt)
    assert told.stdout == filed.stdout == piped.stdout


def test_a_file_of_prompts(blt_run: Path, tmp_path: Path) -> None:
    """Rows keep their keys and order, and hold what each prompt gives alone."""
    rows = sample_rows(11)
    write_prompts(tmp_path / "prompts.jsonl", rows)
    options = ["--max-new-bytes", 10, "--temperature", 1, "--top-k", 50, "--seed", 3, "--device", "cpu"]
    arguments = ["generate", "--checkpoint", blt_run, "--prompts", tmp_path / "prompts.jsonl", *options]
    done = run(*arguments, "--batch-size", 4, "--output", tmp_path / "out.jsonl")
    assert done.exit_code == 0, done.output
    assert "latent steps" in done.stdout
    completed = read_rows(tmp_path / "out.jsonl")
    generator = generator_of(open_model(blt_run, device="cpu"))
    for index, (row, result) in enumerate(zip(rows, completed, strict=True)):
        assert {key: result[key] for key in row} == row
        sampling = SamplingOptions(temperature=row.get("temperature", 1.0), top_k=50, seed=row.get("seed", 3 + index))
        request = Request(
            prompt=row["prompt"].encode(),
            max_new_bytes=row.get("max_new_bytes", 10),
            sampling=sampling,
            stop=tuple(stop.encode() for stop in row.get("stop", ())),
        )
        (alone,) = generator.generate([request])
        content = bytes.fromhex(result["completion_hex"]) if "completion_hex" in result else None
        assert (content or result["completion"].encode()) == alone.content
        assert result["completion"] == alone.content.decode("utf-8", "replace")
        assert (result["finish"], result["bytes"], result["patches"]) == (
            str(alone.finish),
            len(alone.content),
            alone.patches,
        )
        assert result["log_probability"] == pytest.approx(sum(alone.log_probabilities), abs=1e-3)
    again = run(*arguments, "--output", tmp_path / "out.jsonl")
    assert again.exit_code == 0
    assert "is there already" in again.stderr
    assert [path.name for path in tmp_path.iterdir() if "out.jsonl" in path.name] == ["out.jsonl"]


def test_finished_prompts_are_not_done_again(blt_run: Path, tmp_path: Path) -> None:
    """Stopped after any completion, with the last line torn, it goes on to the same file."""
    opened = open_model(blt_run, device="cpu")
    write_prompts(tmp_path / "prompts.jsonl", sample_rows(7))
    defaults = Request(prompt=b"", max_new_bytes=8, sampling=SamplingOptions(temperature=1.0))
    prompts = PromptFile(tmp_path / "prompts.jsonl", defaults)

    def whole(output: Path) -> list[int]:
        return [number for number, _ in complete_file(opened, prompts, output, rows=1, total=7)]

    assert whole(tmp_path / "reference.jsonl") == list(range(7))
    for stop in range(1, 7):
        output = tmp_path / f"out-{stop}.jsonl"
        job = complete_file(opened, prompts, output, rows=1, total=7)
        assert [next(job)[0] for _ in range(stop)] == list(range(stop))
        job.close()  # type: ignore[attr-defined]  # a generator
        assert not output.exists()
        with journal_of(output).open("ab") as file:
            file.write(b'{"line": 6, "row": {"prom')
        assert whole(output) == list(range(stop, 7))
        assert output.read_bytes() == (tmp_path / "reference.jsonl").read_bytes()
        assert not journal_of(output).exists()


def test_killed_while_completing(blt_run: Path, tmp_path: Path) -> None:
    """SIGKILL at some instant; the same command ends with the output of an undisturbed run."""
    write_prompts(tmp_path / "prompts.jsonl", [{"prompt": f"text {index}"} for index in range(12)])
    command = [sys.executable, "-m", "blt_train", "generate", "--checkpoint", str(blt_run), "--prompts"]
    command += [str(tmp_path / "prompts.jsonl"), "--max-new-bytes", "40", "--device", "cpu", "--batch-size", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = tmp_path / "out.jsonl"
    process = subprocess.Popen([*command, "--output", str(output)], env=environment, stderr=subprocess.DEVNULL)
    journal = journal_of(output)
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = journal.read_bytes()
    assert not output.exists()
    done = CliRunner().invoke(main, [*command[3:], "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert f"{kept.count(chr(10).encode()) - 1}" in done.stdout
    assert CliRunner().invoke(main, [*command[3:], "--output", str(tmp_path / "other.jsonl")]).exit_code == 0
    assert output.read_bytes() == (tmp_path / "other.jsonl").read_bytes()


def test_a_journal_of_another_job_is_refused(blt_run: Path, tmp_path: Path) -> None:
    opened = open_model(blt_run, device="cpu")
    assert opened.entropy_model is not None
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    write_prompts(path, sample_rows(3))
    prompts = PromptFile(path, Request(prompt=b"", max_new_bytes=5))
    job = complete_file(opened, prompts, output, rows=1, total=3)
    next(job)
    del job
    other = dataclasses.replace(prompts, defaults=Request(prompt=b"", max_new_bytes=6))
    with pytest.raises(ValueError, match=r"belongs to a job with another options; remove it"):
        next(complete_file(opened, other, output, rows=1, total=3))
    scorer = fresh_model(opened.entropy_model.config, 7)
    assert isinstance(scorer, ByteLM)
    stranger = dataclasses.replace(opened, entropy_model=scorer)
    with pytest.raises(ValueError, match="another entropy model"):
        next(complete_file(stranger, prompts, output, rows=1, total=3))
    kept = path.read_bytes()
    write_prompts(path, sample_rows(4))
    with pytest.raises(ValueError, match="another prompts"):
        next(complete_file(opened, prompts, output, rows=1, total=4))
    path.write_bytes(kept)
    journal_of(output).write_bytes(journal_of(output).read_bytes() + b"}{\n")
    with pytest.raises(ValueError, match="is damaged; remove it"):
        next(complete_file(opened, prompts, output, rows=1, total=3))
    # Of a journal whose first line was cut off, nothing is left to keep.
    journal_of(output).write_bytes(b'{"prompts": "')
    assert len(list(complete_file(opened, prompts, output, rows=2, total=3))) == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "is no JSON in UTF-8"),
        (b"\xff", "is no JSON in UTF-8"),
        (b"[1]", "no object with a prompt"),
        (b'{"prompt": 3}', "no object with a prompt"),
        (b'{"prompt": "a", "top_k": 0}', "top_k is 0"),
        (b'{"prompt": "a", "top_k": "x"}', "top_k is 'x'"),
        (b'{"prompt": "a", "max_new_bytes": -1}', "max_new_bytes is -1"),
        (b'{"prompt": "a", "stop": [""]}', "stop string is empty"),
        (b'{"prompt": "a", "stop": [1]}', "give a list of strings"),
        (b'{"prompt": "a", "completion": ""}', "'completion'"),
    ],
)
def test_bad_lines_are_named(blt_run: Path, tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line + b"\n")
    result = run("generate", "--checkpoint", blt_run, "--prompts", path, "--output", tmp_path / "o", "--device", "cpu")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "prompts.jsonl, line 2" in result.stderr
    assert words in result.stderr


def test_one_prompt_is_asked_for(blt_run: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ([], "not none"),
        (["--prompt", "a", "--prompt-file", "-"], "not --prompt and --prompt-file"),
        (["--prompts", tmp_path / "p.jsonl"], "needs --output"),
        (["--prompts", tmp_path / "p.jsonl", "--output", tmp_path / "o"], "p.jsonl"),
        (["--prompt", "a", "--top-p", "2"], "top_p is 2.0"),
    ):
        result = run("generate", "--checkpoint", blt_run, *arguments)
        assert result.exit_code == 1
        assert words in result.stderr


def test_quantized_weights_continue_a_prompt(blt_run: Path, tmp_path: Path) -> None:
    """The journal of a file of prompts tells them from the weights as they were trained."""
    arguments = ["generate", "--checkpoint", blt_run, "--quantize", "int8", "--device", "cpu", "--max-new-bytes", "5"]
    result = run(*arguments, "--prompt", "def ", "--output", tmp_path / "text")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "text").read_bytes().startswith(b"def ")
    opened = open_model(blt_run, device="cpu")
    dense = model_fingerprint(opened.model)
    quantize_int8(opened.model)
    assert model_fingerprint(opened.model) != dense
    result = run(*arguments[:-4], "--prompt", "a", "--quantize", "int3")
    assert result.exit_code == 2
    assert "int3" in result.stderr


def test_contexts_begin_at_new_lines_where_they_did_in_scoring(blt_run: Path, tmp_path: Path) -> None:
    """What the provenance says reaches generation, from a run and from what it exports."""
    opened = open_model(blt_run, device="cpu")
    assert not opened.reset_at_newlines
    state_file = blt_run / "latest" / "trainer.json"
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", blt_run, copy], check=True)
    document = json.loads(state_file.read_text(encoding="utf-8"))
    for source in document["data"]["sources"].values():
        source["provenance"]["entropy_model"]["reset_at_newlines"] = True
    (copy / "latest" / "trainer.json").write_text(json.dumps(document), encoding="utf-8")
    changed = open_model(copy, device="cpu")
    assert changed.reset_at_newlines
    export_model(copy, tmp_path / "exported")
    exported: OpenedModel = open_model(tmp_path / "exported", device="cpu")
    assert exported.reset_at_newlines
    assert exported.scheme == opened.scheme
