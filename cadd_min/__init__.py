"""Continuously Augmented Discrete Diffusion (arXiv 2510.01329). The loose files are the paper. Read them in this order:

 1  schedule.py    alpha_t for the tokens, gamma_bar_t for their latents
 2  forward.py     Proposition 1: tokens are masked, masked tokens keep a noisy latent
 3  posterior.py   Proposition 2: one reverse step where the answer is known
 4  loss.py        Lemma 1: the KL splits; the losses and the likelihood bound
 5  latent.py      the table w and how long its rows are; z_tilde, the network's input
 6  dit.py         the transformer; unet.py, the U-Net for images; model.py, the denoiser and its settings
 7  objective.py   what is trained: CE, CE + MSE, wrong hints
 8  reverse.py     one reverse step from the network's logits: flip, draw, move
 9  sampler.py     the reverse chain
10  orders.py      when each position flips: the exact chain, orders, blocks, remasking, first hitting
11  ops.py         the two hot loops, fused: one door to the kernels of csrc/

Every other concern has a room. A room imports only itself and the rooms to its left:
utils < kernels < the paper < data, baselines < upgrade < checkpoints < training, sampling < evaluation, codebench
"""

import os

__version__ = "0.1.0"

# How long OpenMP's threads spin at a barrier before they sleep. OpenMP reads it once, when torch is loaded. Its own
# 300,000 turns take the time of a machine that has other work: see benchmarks/contention.py.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
