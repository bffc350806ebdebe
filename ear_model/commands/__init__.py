"""Commands of ``ear`` with a module of their own; ``COMMAND_MODULES`` in :mod:`ear_model.cli` lists them."""
