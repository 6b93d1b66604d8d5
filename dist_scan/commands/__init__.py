"""Commands of `python -m dist_scan`.

One module per command, with `add_arguments(parser)` and `main(args)`, which returns the exit code.
Modules are imported only when their command is run or described, so heavy imports are inside main.
"""
