"""The door between Python and the fused kernels of csrc/. Nothing in this room knows the model.

philox    random words, the same on every backend
build     what the kernels are compiled from, and how
register  loads the kernels, or puts the reference in their place, as operators of PyTorch
"""
