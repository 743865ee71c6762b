"""Text and conversations as tokens and back."""
