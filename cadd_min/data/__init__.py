"""From files to tokens to micro-batches.

tokenizer      text to token ids and back: GPT-2's BPE at any size, and characters
hf_tokenizer   the tokenizer of a pretrained model
pixels         images to tokens and back
codec          the protocol of tokenizers and pixels, and the door that rebuilds each kind
documents      the documents in .txt, .jsonl and .parquet files
corpus         text corpora by name or path
split          which documents and pairs are held out, by their content
shards         how a corpus becomes a folder of token files
token_folder   a folder of token files, read one slice at a time
pairs          prompts with responses
image_files    pictures in PNG and JPEG files, and folders of them
images         image data sets by name or path
batches        micro-batches of text, lines, pairs and images, shuffled in each epoch
"""
