"""A short training run on a text that never changes, whose losses are frozen in `losses/`.

    python -m tests.blt_train.smoke_run          compare, and say how far they are
    python -m tests.blt_train.smoke_run --freeze write them anew, after a change that is meant to change them

What may differ between machines is the order and rounding of sums, nothing else: weights, order of data and arithmetic
follow from the seed. Another order (one sequence at a time instead of two) moves the losses of these 50 steps by 1.4e-7
of their value at most, a learning rate that is off by a hundredth by 5e-3, a weight decay by 3e-5. TOLERANCE lies
between: room for other processors and releases of torch, and none for other mathematics.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.blt_train.samples import blt_config, byte_config, write_documents, write_patched

from blt_train import train

LOSSES = Path(__file__).with_name("losses")
TOLERANCE = 1e-5
"""Relative difference of a loss."""
STEPS = 50
KINDS = ("byte-lm", "blt")

TEXT = """
The harbour wakes before the town does. Gulls argue over the nets, a winch coughs twice and holds, and somebody who
has not slept carries coffee down the pier in a tin can with a wire handle.
Maren counts the boats by their lights: three out, five in, one late as always. She writes the names on the back of a
tide table, because paper that is about to be thrown away is the only paper she trusts with numbers.

def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b)) ** 0.5

In the schoolroom above the chandler's shop they learn the winds: Nordwest, Südwest, Föhn. The children shout them back
in the wrong order, and the teacher, who once sailed, turns the map upside down so that they are right after all.
Ветер с моря приносит дождь. Рыбаки чинят сети и ждут.
潮が満ちて、船が帰る。子どもたちは岸で手を振る。
"What is it that you sell?" asked the stranger. "Rope," said the chandler, "and the patience to untangle it."
By noon the fog has gone as far as the lighthouse; by two it is back. The late boat comes in under it, slow, sounding
its horn four times, which means nothing in any code but makes the dogs answer.
1 kg of salt, 12 hooks, 3 lamps; paid 48.50 on account. Balance: 112.75. Signed with a thumb, witnessed by the cat.
At night the water keeps the day's warmth for an hour, and the stones along the quay tick as they cool. Maren turns the
tide table over. Tomorrow is printed there already, to the minute, and not one name.
"""


def documents() -> list[bytes]:
    """The text's lines, and ever longer runs of them: documents that fit a sequence and some that do not."""
    lines = TEXT.strip().split("\n")
    runs = ["\n".join(lines[start : start + size]) for size in (3, 7) for start in range(0, len(lines), size)]
    return [item.encode() for item in [*lines, *runs, "\n".join(lines)] if item]


def losses(kind: str, *overrides: str) -> list[float]:
    """Train and return the loss of every step."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        steps = [f"schedule.total_steps={STEPS}", f"checkpoint.every={STEPS}", *overrides]
        if kind == "byte-lm":
            write_documents(root / "bytes", documents())
            config = byte_config(root, "run", *steps)
        else:
            write_patched(root / "patched", documents())
            config = blt_config(root, "run", *steps)
        return [metrics.loss for metrics in train(config).steps]


def frozen(kind: str) -> list[float]:
    """The losses that are kept."""
    values: list[float] = json.loads((LOSSES / f"{kind}.json").read_text(encoding="utf-8"))
    return values


def main(arguments: list[str]) -> None:
    """Compare or freeze."""
    for kind in KINDS:
        found = losses(kind)
        if arguments == ["--freeze"]:
            LOSSES.mkdir(exist_ok=True)
            (LOSSES / f"{kind}.json").write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
        farthest = max(abs(mine / kept - 1) for mine, kept in zip(found, frozen(kind), strict=True))
        sys.stdout.write(f"{kind}: {found[0]:.4f} to {found[-1]:.4f}, at most {farthest:.1e} from what is frozen\n")


if __name__ == "__main__":
    main(sys.argv[1:])
