"""`python -m qtool` runs the command `qtool`."""

from qtool.cli import main

main()
