"""How good a model is: validation while it trains; perplexity, scores of text and tasks of a checkpoint."""
