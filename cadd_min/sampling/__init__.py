"""What sample.py needs: one call with all options, and how text and images are shown."""
