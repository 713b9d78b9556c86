"""The command line: the only part that prints, and that knows exit codes."""

from malmend.cli.run import main as main
