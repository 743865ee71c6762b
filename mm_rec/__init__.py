"""MM-Rec: a small language model with a memory of fixed size, trained on the machine you have."""

__version__ = "0.1.0"

__all__ = ["__version__"]
