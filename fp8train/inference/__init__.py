"""The use of a trained model: loading it from a checkpoint, continuing text, exporting its states."""
