"""`popo-lite init`: look at model, data, reward and card, and write a recipe that fits."""
