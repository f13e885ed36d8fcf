"""Three models to compare with, on the same network: autoregressive, uniform-state diffusion, score entropy."""
