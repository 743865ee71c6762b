"""How good a model is: bits per byte, recall by distance, tasks of lm-eval, and a page with all of it."""
