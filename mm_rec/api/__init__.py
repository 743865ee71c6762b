"""The Python interface: load a trained model and use it, train one."""
