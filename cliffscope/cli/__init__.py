"""The command line: parse the options, make one library call, print the result.

Each command is a function of the library, with the same names and defaults. Exit codes: 0 done, 2 usage, 3 bad input, 4
unsupported model, 5 run directory, 6 missing extra, 7 memory or server, 130 interrupted.
"""

from cliffscope.cli import studies, steps, answers, training, inspection, organisms  # noqa: F401, I001 - registering, in the order of --help
from cliffscope.cli.program import app, main

__all__ = ["app", "main"]
