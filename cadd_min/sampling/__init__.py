"""What sample.py needs around the sampler.

generate  the sampler's options, a call with them, a line that records them, --watch
text      prompts with gaps, and a text in the terminal
images    classes, guidance, inpainting, and where the pictures go
pictures  grids, GIFs, the forward process, images in the terminal
text_film a GIF of a text being written
page      a page of HTML that replays the chain, with page.html
"""
