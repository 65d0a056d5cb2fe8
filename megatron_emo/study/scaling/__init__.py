"""examples/scaling: a whole scaling study of a laptop's size."""
