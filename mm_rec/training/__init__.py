"""From settings and data to a trained model."""
