"""Train sweeps over recipe settings and seeds, and compare their runs."""
