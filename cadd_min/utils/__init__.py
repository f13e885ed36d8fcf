"""What every other room may use, and what knows nothing of diffusion.

errors       the one exception that a user sees, and how it is worded
cli          dataclasses as command-line options, and how a script ends
device       devices, dtypes, and generators by seed
files        files that are whole or not there, JSON, downloads
huggingface  folders of the Hugging Face hub
plots        matplotlib for pictures in files
"""
