"""`python -m blt_train`: the same as the `blt-train` command, as torchrun needs it."""

from blt_train.cli import main

main(prog_name="blt-train")
