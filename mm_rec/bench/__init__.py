"""The speed of this machine: training steps, kernels and generation against limits measured beside them."""
