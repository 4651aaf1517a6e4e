"""The README's example runs as it stands."""

import re
from pathlib import Path
from typing import Any

import torch


def test_example_runs(repository: Path) -> None:
    text = (repository / "packages" / "blt-model" / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["batch"].tokens.shape == (19,)
    assert torch.isfinite(names["nats"])
