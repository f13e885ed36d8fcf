"""The denoiser with the methods of the Hugging Face hub. They read and write the folders of folder.py.

from cadd_min.checkpoints.hub import Denoiser
model = Denoiser.from_pretrained("owner/name")    # or the path of a folder
model.push_to_hub("owner/other-name")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cadd_min import model
from cadd_min.checkpoints import folder, load
from cadd_min.data.codec import Codec
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import new_or_empty
from cadd_min.utils.huggingface import INSTALL

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:
    raise InputError(f"the methods of the Hugging Face hub need its client: {INSTALL}") from None


class Denoiser(
    model.Denoiser,
    PyTorchModelHubMixin,
    library_name="cadd_min",
    paper_url="https://arxiv.org/abs/2510.01329",
    tags=["discrete-diffusion"],
):
    """A `cadd_min.model.Denoiser` together with its codec: a tokenizer, or pixels."""

    def __init__(self, config: model.ModelConfig, codec: Codec):
        super().__init__(config)
        self.codec = codec

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Path | str, *, revision: str | None = None, **download: Any
    ) -> Denoiser:
        """Open a model from a folder or from the hub. Raises InputError.

        download: options of huggingface_hub.snapshot_download, like token and cache_dir. This replaces the mixin's
        method, not only the hook inside it: the mixin reads the configuration before the hook runs.
        """
        content = folder.read(pretrained_model_name_or_path, revision, **download)
        plain, codec = load.denoiser_of(content, Path(pretrained_model_name_or_path))
        own = cls(plain.config, codec)
        own.load_state_dict(plain.state_dict())
        return own.eval()

    def save_pretrained(self, save_directory: Path | str, **options: Any) -> str | None:
        """Write a new folder with a model card. options: those of the mixin's method. Raises InputError."""
        new_or_empty(save_directory)  # the mixin would first delete a config.json
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        folder.save_pretrained(self, self.codec, save_directory)
