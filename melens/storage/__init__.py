"""Files that are whole or not there, and what is kept for the next run."""
