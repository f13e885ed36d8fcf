"""From files to tokens: corpora and images by name or path, tokenizers, token folders, batches."""
