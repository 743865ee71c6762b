"""The block that the experts are stacked from."""
