"""`python -m fedamole` is the command `fedamole`."""

from fedamole.cli import main

main()
