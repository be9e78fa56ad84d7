"""`python -m echelon` is the command line."""

from echelon.cli import main

main()
