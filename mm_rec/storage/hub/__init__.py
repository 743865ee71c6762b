"""Models and data sets on a hub: asking it, fetching models from it, and putting its errors into words."""
