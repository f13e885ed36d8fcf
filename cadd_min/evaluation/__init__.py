"""What evaluate.py measures of text and of images."""
