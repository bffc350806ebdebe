"""A module a command; ``ear_model.cli`` calls them."""
