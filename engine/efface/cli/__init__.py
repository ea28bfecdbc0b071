"""The command line. Each command has a module with ``parser()`` and ``run(argv)``; ``main`` lists the commands."""
