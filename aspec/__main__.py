"""Run the command line: ``python -m aspec``."""

from aspec.cli.main import main

main()
