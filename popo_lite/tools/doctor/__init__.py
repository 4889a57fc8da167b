"""Check this machine: driver, libraries, every kernel that a run uses, and the network. `command` has the command."""
