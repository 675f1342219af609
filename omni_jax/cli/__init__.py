"""The command line: one module per command, each with `add_arguments(parser)` and `run(args) -> int`.

`run` returns an exit status of status.py. It raises InputError or ConfigError for what in the arguments, or in the files that they name,
cannot be used. What is slow to import is imported within functions, so that `--help` and usage errors answer at once.
"""
