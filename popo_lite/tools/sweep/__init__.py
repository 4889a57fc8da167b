"""Several runs: sweeps over recipe keys and seeds, and the comparison of what they came to."""
