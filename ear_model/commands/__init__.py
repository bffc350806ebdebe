"""Commands of ``ear`` with a module of their own; ``COMMAND_MODULES`` of ear_model/cli.py registers them."""
