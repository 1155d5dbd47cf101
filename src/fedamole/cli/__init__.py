"""The command line: every command of `fedamole`. The only package that uses typer and rich tables."""
