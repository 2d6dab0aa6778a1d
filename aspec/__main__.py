"""``python -m aspec``."""

from aspec.cli import main

main()
