"""One file per family: its config, its block, its model and the names of its tensors."""
