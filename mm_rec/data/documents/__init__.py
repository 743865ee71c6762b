"""Documents as people have them: kinds of files, their readers, and what is left out and why."""
