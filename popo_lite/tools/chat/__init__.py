"""Talk with a trained model in the terminal."""
