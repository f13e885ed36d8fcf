"""Models on disk, and how each kind is opened again.

file    a run's checkpoint: everything, with a checksum
folder  a trained model as a folder for others: safetensors and JSON
mdlm    the public MDLM's weights as ours, and ours as theirs
load    the door that opens every kind of model
hub     the denoiser with the methods of the Hugging Face hub
"""
