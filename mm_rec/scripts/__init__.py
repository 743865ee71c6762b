"""The commands of the guides; each parses its flags, builds a configuration and calls the library."""
