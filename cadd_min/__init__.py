"""cadd_min: Continuously Augmented Discrete Diffusion, one proposition a file."""

__version__ = "0.1.0"
