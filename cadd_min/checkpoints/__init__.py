"""Models on disk: a run's checkpoint, a folder for others, the Hugging Face hub, the public MDLM's weights."""
