"""An existing language model as the denoiser.

families  which Hugging Face class computes a model, and what the model's files omit
lora      LoRA put into a network, and merged again
wrapper   the network with the latent at its masked positions
folder    an upgraded model on disk, in the Hugging Face library's format
"""
