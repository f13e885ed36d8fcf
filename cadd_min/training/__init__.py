"""A run: its start, the trainer, the loop, many processes, and the log."""
