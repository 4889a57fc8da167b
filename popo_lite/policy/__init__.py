"""The policy: a frozen 4-bit base, trainable adapters, the predictor head and the siamese average."""
