"""The commands: their arguments, exit codes and messages."""
