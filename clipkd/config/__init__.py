"""Options of every command, torch-free: dataclasses, YAML and command line."""
