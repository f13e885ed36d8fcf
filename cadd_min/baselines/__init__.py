"""Three models to compare with, on the same network: autoregressive, uniform-state diffusion, score entropy.

common    features, logits and draws that the three share
ar        left to right, with an exact likelihood
sedd      absorbing state: the network learns ratios of probabilities
udm       uniform state: noise is a random token
dispatch  the door: a model's loss, bound and chain by its name
"""
