"""`python -m cliffscope` is the command line."""

from cliffscope.cli import main

main()
