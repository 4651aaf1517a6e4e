"""The subcommands of `blt-patch`, one module each, and what they share (`options`, `scoring`)."""
