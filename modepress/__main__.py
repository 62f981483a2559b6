"""`python -m modepress` is the command `modepress`."""

from modepress.cli import main

main()
