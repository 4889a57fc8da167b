"""The training step, and what a run keeps."""
