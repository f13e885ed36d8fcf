"""Image data sets by name or path. No pickle is read: of CIFAR-10 the binary version, of ImageNet-32 the .npz files."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cadd_min.data.pixels import Pixels
from cadd_min.utils.errors import InputError, described
from cadd_min.utils.files import checked, download

CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # stated on the same site
FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MD5 = {  # stated in the data set's README
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
NAMES = ("digits", "fashion-mnist", "cifar10", "imagenet32")
ENDINGS = (".png", ".jpg", ".jpeg")
HELD_OUT = 5  # one image in this many, where the data set has no test images of its own


@dataclass(frozen=True)
class Images:
    """A data set: (N, H, W, C) uint8 from black to white, apart into training and held-out images.

    labels: (N,) each, from 0 on, or None; levels: how many the values come in; flip: whether a mirrored one is as good.
    """

    name: str
    train: np.ndarray
    held_out: np.ndarray
    labels: tuple[np.ndarray, np.ndarray] | None = None
    levels: int = 256
    flip: bool = False

    def pixels(self) -> Pixels:
        """How its images become tokens."""
        height, width, colours = self.train.shape[1:]
        return Pixels((height, width, colours), self.levels)

    def classes(self) -> int:
        """How many labels there are; 0 without any."""
        return 0 if self.labels is None else int(max(part.max() for part in self.labels)) + 1


def open_images(dataset: str, cache: Path, archive: Path | None = None) -> Images:
    """The data set of that name (`archive`: where it lies, if it is not to be downloaded), or at that path.

    Raises InputError if there is none, or it is not what it should be.
    """
    if archive is not None and not archive.exists():
        raise InputError(f"--archive {archive} does not exist")
    if dataset == "digits":
        return _digits()
    if dataset == "fashion-mnist":
        return _fashion(archive, cache)
    if dataset == "cifar10":
        path = archive or cache / "cifar-10-binary.tar.gz"
        return _cifar10(download(CIFAR10, path, dataset, CIFAR10_MD5, "--archive"))
    if dataset == "imagenet32":
        if archive is None:
            raise InputError("--dataset imagenet32 needs --archive, the folder of its official .npz batch files")
        return _imagenet32(archive)
    path = Path(dataset).expanduser()
    if not path.exists():
        raise InputError(f"--dataset must be one of {', '.join(NAMES)} or a path that exists, not {dataset!r}")
    return _folder(path) if path.is_dir() else _npz(path)


def _split(name: str, images: np.ndarray, labels: np.ndarray | None, **more: object) -> Images:
    """Every fifth image is held out."""
    out = np.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    if not out.any():
        raise InputError(f"--dataset {name} has {len(images)} images: at least {HELD_OUT} are needed")
    parts = None if labels is None else (labels[~out], labels[out])
    return Images(name, images[~out], images[out], parts, **more)  # type: ignore[arg-type]


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("--dataset digits needs its package: pip install scikit-learn") from None
    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)[..., None]
    return _split("digits", images, found.target.astype(np.int64), levels=17)


def _fashion(folder: Path | None, cache: Path) -> Images:
    arrays = []
    for file, md5 in FASHION_MD5.items():
        if folder is None:
            path = download(FASHION + file, cache / "fashion-mnist" / file, "fashion-mnist", md5, "--archive")
        else:
            path = folder / file if (folder / file).exists() else folder / file.removesuffix(".gz")
        arrays.append(read_idx(path))
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise InputError(f"--archive {folder}: {images.shape} images and {labels.shape} labels do not fit together")
    train, train_labels, test, test_labels = arrays
    both = (train_labels.astype(np.int64), test_labels.astype(np.int64))
    return Images("fashion-mnist", train[..., None], test[..., None], both)


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the idx format of MNIST, .gz or not. Raises InputError if it is none, or not whole."""
    try:
        data = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read the idx file {path}: {getattr(error, 'strerror', None) or error}") from None
    zero, kind, dimensions = struct.unpack(">HBB", data[:4].ljust(4, b"\0"))
    start = 4 + 4 * dimensions
    if zero != 0 or kind != 8 or not dimensions or len(data) < start:
        raise InputError(f"{path} is not an idx file of unsigned bytes")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    if len(data) != start + np.prod(shape, dtype=np.int64):
        raise InputError(f"{path} should hold an array of {shape} bytes, but has {len(data) - start}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _cifar10(path: Path) -> Images:
    """The official binary version: each image is its label, then its red, green and blue values."""
    checked(path, CIFAR10_MD5)
    parts = []
    with tarfile.open(path) as archive:
        for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
            file = archive.extractfile(f"cifar-10-batches-bin/{name}")
            parts.append(np.frombuffer(file.read(), np.uint8).reshape(-1, 1 + 3072))  # type: ignore[union-attr]
    (train, train_labels), (test, test_labels) = (
        _planes(p[:, 1:], p[:, 0]) for p in (np.concatenate(parts[:5]), parts[5])
    )
    return Images("cifar10", train, test, (train_labels, test_labels), flip=True)


def _planes(data: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3072) values, one colour after the other -> (N, 32, 32, 3); labels as int64."""
    return np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels.astype(np.int64)


def _imagenet32(folder: Path) -> Images:
    """The official .npz batches (Chrabaszcz et al. 2017): `data` (N, 3072) uint8 and `labels` from 1 to 1000."""
    if not folder.is_dir():
        raise InputError(f"--archive {folder} must be the folder of the batch files")
    files = sorted(folder.glob("*train_data_batch_*.npz")), sorted(folder.glob("*val_data.npz"))
    if not all(files):
        raise InputError(
            f"--archive {folder} needs train_data_batch_1.npz and so on and val_data.npz: the .npz version of "
            "ImageNet-32, for the other one is made of pickles, which are not read here"
        )
    parts = []
    for part in files:
        batches = [_arrays(file, ("data", "labels")) for file in part]
        for file, batch in zip(part, batches):
            if batch["data"].dtype != np.uint8 or batch["data"].shape != (len(batch["labels"]), 3072):
                raise InputError(f"{file}: expected 'data' (N, 3072) of uint8 and N 'labels'")
        data, labels = (np.concatenate([batch[name] for batch in batches]) for name in ("data", "labels"))
        parts.append(_planes(data, labels - 1))
    (train, train_labels), (test, test_labels) = parts
    return Images("imagenet32", train, test, (_labels(folder, train_labels), _labels(folder, test_labels)), flip=True)


def _labels(path: Path, found: np.ndarray) -> np.ndarray:
    """Labels as int64, if they are numbers from 0 on."""
    if found.dtype.kind not in "iu" or found.ndim != 1 or found.min() < 0 or found.max() >= 100_000:
        raise InputError(f"--dataset {path}: labels must be whole numbers from 0 on, one for each image")
    return found.astype(np.int64)


def _arrays(path: Path, wanted: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, those wanted at least."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged archive fails in any way
        raise InputError(f"{path} is not an .npz file that can be read: {described(error)}") from None
    for name in wanted:
        if name not in arrays:
            raise InputError(f"{path} has no array {name!r}, only {', '.join(arrays)}")
    return arrays


def _npz(path: Path) -> Images:
    """x_train (N, H, W, C) uint8, and where there are any y_train, x_test, y_test; or encoded images, see `_packed`."""
    arrays = _arrays(path)
    if "x_train" not in arrays and {"jpeg", "offset"} <= set(arrays):
        arrays = _packed(path, arrays)
    if "x_train" not in arrays:
        raise InputError(f"--dataset {path} has no array 'x_train', only {', '.join(arrays) or 'none'}")
    shapes = {}
    for name in ("x_train", "x_test"):
        if name not in arrays:
            continue
        x = arrays[name] = arrays[name][..., None] if arrays[name].ndim == 3 else arrays[name]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape:
            raise InputError(f"--dataset {path}: {name} must be (N, H, W, 1 or 3) of uint8, not {x.shape} of {x.dtype}")
        shapes[name] = x.shape[1:]
        labels = arrays.get(name.replace("x_", "y_"))
        if labels is not None and labels.shape != x.shape[:1]:
            raise InputError(f"--dataset {path} has {len(x)} images and labels of the shape {labels.shape} in {name}")
    if len(set(shapes.values())) > 1:
        raise InputError(f"--dataset {path} has images of mixed sizes: {shapes}")
    train, test = (_labels(path, arrays[name]) if name in arrays else None for name in ("y_train", "y_test"))
    if "x_test" not in arrays:
        return _split(path.stem, arrays["x_train"], train)
    both = None if train is None or test is None else (train, test)
    return Images(path.stem, arrays["x_train"], arrays["x_test"], both)


def _packed(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Images kept as files: `jpeg`, the bytes of all; `offset`, N + 1 places where they begin and end; where there are
    any `label`, and `split`, 0 for training and 1 for test."""
    data, offset = arrays["jpeg"], arrays["offset"]
    rises = offset.ndim == 1 and offset.dtype.kind in "iu" and len(offset) > 1 and (offset[1:] >= offset[:-1]).all()
    if data.dtype != np.uint8 or data.ndim != 1 or not rises or offset[0] != 0 or offset[-1] != data.size:
        raise InputError(f"--dataset {path}: 'offset' must rise from 0 to the {data.size} bytes of 'jpeg'")
    count = len(offset) - 1
    images = _stack([(f"image {i} of {path}", data[offset[i] : offset[i + 1]].tobytes()) for i in range(count)], path)
    split, label = arrays.get("split", np.zeros(count)), arrays.get("label")
    if split.shape != (count,) or (label is not None and label.shape != (count,)):
        raise InputError(f"--dataset {path}: 'split' and 'label' must have one number for each of the {count} images")
    found = {}
    for number, name in enumerate(("train", "test")):
        part = split == number
        if part.any():
            found[f"x_{name}"] = images[part]
            found |= {f"y_{name}": label[part]} if label is not None else {}
    return found


def _folder(path: Path) -> Images:
    """Every PNG and JPEG in a folder; folders within it are classes."""
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in ENDINGS)
    if not files:
        raise InputError(f"--dataset {path} is a folder without {', '.join(ENDINGS)} files")
    images = _stack([(str(file), file.read_bytes()) for file in files], path)
    names = sorted({file.parent for file in files})
    labels = np.array([names.index(file.parent) for file in files]) if path not in names else None
    return _split(path.name, images, labels)


def _stack(files: list[tuple[str, bytes]], path: Path) -> np.ndarray:
    """(N, H, W, C) from encoded images with their names. Raises InputError where their sizes differ."""
    images = [read_image(data, name) for name, data in files]
    for image, (name, _) in zip(images, files):
        if image.shape != images[0].shape:
            sizes = " and ".join("x".join(map(str, shape)) for shape in (images[0].shape, image.shape))
            raise InputError(f"--dataset {path} has images of mixed sizes, {sizes} ({name}): make them all one size")
    return np.stack(images)


def pillow() -> Any:
    """PIL.Image. Raises InputError where it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError("pictures need their package: pip install pillow") from None
    return Image


def read_image(data: bytes, name: str) -> np.ndarray:
    """(H, W, 3), or (H, W, 1) for a grey one, uint8. Raises InputError if these bytes are no image."""
    Image = pillow()
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):  # a conversion would cut them off at 255
                raise InputError(f"{name} has more than 8 bits a colour: convert it first")
            grey = image.mode in ("1", "L", "LA")
            return np.atleast_3d(np.asarray(image.convert("L" if grey else "RGB")))
    except InputError:
        raise
    except Exception:  # a damaged image fails in any way
        raise InputError(f"{name} is not an image that can be read") from None
