"""`python -m fedamole` is the command `fedamole`."""

from fedamole.cli.main import main

main()
