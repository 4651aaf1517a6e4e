"""`blt-train generate`: one prompt to the terminal, or a file of prompts to a file of completions."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from blt_data.console import fail, format_bytes, friendly_errors, print_table, progress
from blt_train.config import Precision
from blt_train.files import naming

if TYPE_CHECKING:
    from blt_model import Request
    from blt_train.models import OpenedModel

_EXAMPLES = """Examples:

\b
blt-train generate --checkpoint runs/blt --prompt 'The meaning of' --temperature 0.7
git log -1 | blt-train generate --checkpoint runs/blt --prompt-file -
blt-train generate --checkpoint runs/blt --prompts prompts.jsonl --output completions.jsonl --batch-size 16
"""


@click.command("generate", epilog=_EXAMPLES)
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="Run directory or checkpoint.")
@click.option("--prompt", help="Text to continue; may be empty.")
@click.option("--prompt-file", type=click.Path(path_type=Path, allow_dash=True), help="Or a file of it; - for stdin.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON Lines: one object with a `prompt` per line, and options of its own if wanted.",
)
@click.option("--max-new-bytes", type=click.IntRange(min=0), default=200, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest byte.")
@click.option("--top-k", type=click.IntRange(min=1), help="Draw among the k likeliest bytes only.")
@click.option("--top-p", type=float, help="Draw among the likeliest bytes that together reach this probability.")
@click.option("--min-p", type=float, help="Draw among bytes at least this fraction as probable as the likeliest.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1 favours new bytes.")
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the draws.")
@click.option("--entropy-model", type=click.Path(path_type=Path), help="Instead of the run's own copy.")
@click.option("--precision", type=click.Choice([str(item) for item in Precision]), default="float32", show_default=True)
@click.option("--quantize", type=click.Choice(["int8"]), help="Linear weights in 8 bits, for one text on a CPU.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Texts at once.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --prompts, the completions; else also write prompt and bytes there, as is.",
)
@friendly_errors
def generate_command(
    checkpoint: Path,
    prompt: str | None,
    prompt_file: Path | None,
    prompts: Path | None,
    max_new_bytes: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    stop: tuple[str, ...],
    seed: int,
    entropy_model: Path | None,
    precision: str,
    quantize: str | None,
    device: str,
    batch_size: int,
    output: Path | None,
) -> None:
    """Continue a prompt, on standard output as it comes, or all prompts of a file.

    Characters appear whole. A file of completions is in the order of its prompts; killed at any instant, the same
    command goes on with the prompts that were not done.
    """
    _check_one_given({"--prompt": prompt, "--prompt-file": prompt_file, "--prompts": prompts})
    if prompts is not None and output is None:
        fail("--prompts needs --output, the file of completions")

    from blt_model import Request, SamplingOptions, quantize_int8
    from blt_train.models import open_model

    request = Request(
        prompt=_read_prompt(prompt, prompt_file),
        max_new_bytes=max_new_bytes,
        sampling=SamplingOptions(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        ),
        stop=tuple(text.encode("utf-8", errors="surrogateescape") for text in stop),
    )
    opened = open_model(checkpoint, entropy_model=entropy_model, device=device)
    if precision == Precision.BFLOAT16:
        # The entropy model stays as it is: boundaries rest on it.
        opened.model.bfloat16()
    if quantize is not None:
        quantize_int8(opened.model)
    if prompts is not None and output is not None:
        _complete_file(opened, prompts, request, output, batch_size)
    else:
        _stream(opened, request, output)


def _check_one_given(options: Mapping[str, object]) -> None:
    """End with a sentence unless just one of the options that name prompts is given."""
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        fail(f"give one of --prompt, --prompt-file and --prompts, not {' and '.join(given) or 'none'}")


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> bytes:
    """The bytes of the prompt; none for a file of prompts."""
    if prompt is not None:
        return prompt.encode("utf-8", errors="surrogateescape")
    if prompt_file is None:
        return b""
    return sys.stdin.buffer.read() if str(prompt_file) == "-" else prompt_file.read_bytes()


def _stream(opened: OpenedModel, request: Request, output: Path | None) -> None:
    """Show one text as it comes."""
    from blt_model import Completion
    from blt_model.generation import CharacterStream
    from blt_train.generation import generator_of

    characters, kept, done = CharacterStream(), bytearray(request.prompt), None
    click.echo(request.prompt.decode("utf-8", errors="replace"), nl=False)
    sys.stdout.flush()
    for _, event in generator_of(opened).events([request]):
        if isinstance(event, Completion):
            done = event
            continue
        kept += event
        if text := characters.push(event):
            click.echo(text, nl=False)
            sys.stdout.flush()
    click.echo()
    if output is not None:
        with naming(output):
            output.write_bytes(bytes(kept))
    if done is not None and sys.stderr.isatty():
        size = len(done.content)
        click.echo(
            f"{size} bytes in {done.seconds:.1f} s ({size / done.seconds:.0f} bytes/s), {done.patches} latent steps, "
            f"ended by {done.finish}",
            err=True,
        )


def _complete_file(opened: OpenedModel, path: Path, request: Request, output: Path, rows: int) -> None:
    """Complete a file of prompts, showing progress, and print the summary."""
    from blt_train.completions import PromptFile, complete_file, done_before, read_totals

    prompts = PromptFile(path, request)
    if output.exists():
        click.echo(f"{output} is there already; remove it to generate again", err=True)
        return
    total = prompts.check()
    resumed = done_before(output)
    started, size = time.monotonic(), 0
    with progress(f"completing {path.name}", total, "prompts") as bar:
        if resumed:
            bar.advance(resumed)
        for _, completion in complete_file(opened, prompts, output, rows=rows, total=total):
            size += len(completion.content)
            bar.advance(1, f"{format_bytes(size / max(time.monotonic() - started, 1e-9))}/s")
    totals = read_totals(output, resumed)
    print_table(
        "Completions",
        {
            "output": output,
            "prompts": totals.prompts,
            "of them by an earlier run": totals.resumed,
            "bytes": totals.bytes,
            "latent steps": totals.patches,
            "bytes per second": f"{size / max(time.monotonic() - started, 1e-9):.0f}",
        },
    )
