"""The objective: credit, losses and log-probs. Pure functions of tensors."""
