"""Commands with a module of their own; ``ear_model.cli.COMMAND_MODULES`` names them."""
