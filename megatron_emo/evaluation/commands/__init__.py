"""The subcommands of tools/evaluate.py, one file each: `add_arguments`, and `run`.

`run(args)` returns records; nothing heavy is imported before it is called.
"""
