"""What `python -m dist_scan` can do: one module per command, with add_arguments(parser) and main(args) -> exit code."""
