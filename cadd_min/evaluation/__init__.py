"""What evaluate.py measures of text and of images.

bound        the likelihood bound of held-out data, with its standard error
held_out     the held-out text of a model, in pieces or in lines
text         the commands on text: bound, samples, frontier, infill
text_judge   a pretrained language model that reads samples
text_scores  the measures of samples of text: likelihood, variety, likeness to real text
images       the commands on images: bound, frechet, fid
image_judge  a small classifier, and samples against real images in its features
fid          FID and its relatives, by torch-fidelity
"""
