"""What lies on the disk: whole files and folders, locks, checkpoints, run folders."""
