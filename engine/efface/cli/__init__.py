"""The command line: one module a command, each with a ``SUMMARY`` and a ``run(argv)``."""
