"""The denoiser with the methods of the Hugging Face hub; what they read and write is said in pretrained.py.

from cadd_min.checkpoints.hub import Denoiser
model = Denoiser.from_pretrained("owner/name")    # or a folder
model.push_to_hub("owner/other-name")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cadd_min import model
from cadd_min.checkpoints import file as checkpoint
from cadd_min.checkpoints import folder as pretrained
from cadd_min.data.pixels import Pixels
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.utils.errors import InputError

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:
    raise InputError(f"the methods of the Hugging Face hub need its client: {pretrained.INSTALL}") from None


class Denoiser(
    model.Denoiser,
    PyTorchModelHubMixin,
    library_name="cadd_min",
    paper_url="https://arxiv.org/abs/2510.01329",
    tags=["discrete-diffusion"],
):
    """A `cadd_min.model.Denoiser` that has its tokenizer, or what stands for it, with it."""

    def __init__(self, config: model.ModelConfig, codec: Tokenizer | Pixels):
        super().__init__(config)
        self.codec = codec

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Path | str, *, revision: str | None = None, **download: Any
    ) -> Denoiser:
        """From a folder or the hub; download: token, cache_dir and the like. Raises InputError.

        All of it, and not the mixin's hook alone: before that the mixin looks at the configuration by itself.
        """
        content = pretrained.read(pretrained_model_name_or_path, revision, **download)
        plain, codec = checkpoint.denoiser_of(content, Path(pretrained_model_name_or_path))
        own = cls(plain.config, codec)
        own.load_state_dict(plain.state_dict())
        return own.eval()

    def save_pretrained(self, save_directory: Path | str, **options: Any) -> str | None:
        """To a new folder, with a model card; options: the mixin's. Raises InputError."""
        pretrained.free(save_directory)  # the mixin would begin with deleting a config.json
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        pretrained.save_pretrained(self, self.codec, save_directory)
