"""The subcommands of `blt-data`, one module each."""
