"""Public sources of data, how they are downloaded, and the data that this machine has already."""
