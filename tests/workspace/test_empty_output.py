"""An unset variable of a shell, given as --output, must not fill the working directory."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import blt_data.cli
import blt_patcher.cli
import blt_train.cli


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (blt_data.cli.main, ["prepare", "--source", "python-stdlib"]),
        (blt_data.cli.main, ["merge", "a", "b"]),
        (blt_patcher.cli.main, ["precompute", "a"]),
        (blt_patcher.cli.main, ["repatch", "a"]),
        (blt_train.cli.main, ["export", "a"]),
        (blt_train.cli.main, ["import", "a"]),
    ],
)
def test_empty_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: click.Command, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, [*arguments, "--output", ""])
    assert result.exit_code == 2
    assert "is an empty text; name a directory" in result.output
    assert not list(tmp_path.iterdir())
