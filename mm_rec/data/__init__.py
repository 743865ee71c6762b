"""From sources on the hub or on disk to batches of tokens."""
