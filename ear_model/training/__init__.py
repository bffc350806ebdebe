"""Training: the loop, its engine, its processes and its checkpoints."""
