"""Using a trained model: loading it from a checkpoint and continuing text."""
