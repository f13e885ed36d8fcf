"""An existing language model as the denoiser: its family, the wrapper, its folder."""
