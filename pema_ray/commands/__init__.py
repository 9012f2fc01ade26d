"""The `pema-ray` command: one module for each family of subcommands."""
