"""What a configuration will need or do, by arithmetic alone: no process group, no memory for a model."""
