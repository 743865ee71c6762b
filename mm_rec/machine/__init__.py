"""Facts of the computer: devices, precision, threads and memory, and the signals that ask a program to stop."""
