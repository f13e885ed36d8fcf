"""Image data sets by name or path.

No pickle is read. CIFAR-10 is read in its binary version, ImageNet-32 in its .npz version.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cadd_min.data import image_files, split
from cadd_min.data.pixels import Pixels
from cadd_min.utils.errors import InputError, described
from cadd_min.utils.files import checked, counted, download, walked

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
HELD_OUT = 5  # one image of this many is held out, where the data set has no test images


@dataclass(frozen=True)
class Images:
    """A data set of images (N, H, W, C) uint8, from 0 (black) to 255 (white), split into training and held-out images.

    labels: (N,) int64 from 0 on for each of the two, or None; levels: how many different values there are; flip:
    whether a mirrored image is as good as the image; class_names: the names of the labels, where these have names.
    """

    name: str
    train: np.ndarray
    held_out: np.ndarray
    labels: tuple[np.ndarray, np.ndarray] | None = None
    levels: int = 256
    flip: bool = False
    class_names: tuple[str, ...] = ()

    def pixels(self) -> Pixels:
        """Return the codec of the images."""
        height, width, colours = self.train.shape[1:]
        return Pixels((height, width, colours), self.levels)

    def digest(self) -> str:
        """Return a hash of all images and labels, and of which are held out."""
        content = hashlib.sha256()
        for array in (self.train, self.held_out, *(self.labels or ())):
            content.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return content.hexdigest()

    def classes(self) -> int:
        """Return the number of classes: the largest label plus 1, or 0 without labels."""
        return 0 if self.labels is None else int(max(part.max() for part in self.labels)) + 1


def chosen(count: int, most: int) -> np.ndarray:
    """Return `most` indices of `count` images, or all, in random order. The same numbers give the same indices.

    Images are often in the order of their classes, so the first ones would stand for the first classes only.
    """
    return np.random.default_rng(0).permutation(count)[:most]


def open_images(dataset: str, cache: Path, archive: Path | None = None) -> Images:
    """Open the data set with the name or the path `dataset`.

    cache: the folder that named data sets are downloaded to; archive: a local file or folder of the named data set,
    instead of the download. Raises InputError where there is no such data set, or where its files are not as expected.
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


def _split(name: str, images: np.ndarray, labels: np.ndarray | None, **fields: object) -> Images:
    """Make a data set of which every fifth image is held out."""
    held_out = np.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    if not held_out.any():
        raise InputError(f"--dataset {name} has {len(images)} images: at least {HELD_OUT} are needed")
    both = None if labels is None else (labels[~held_out], labels[held_out])
    return Images(name, images[~held_out], images[held_out], both, **fields)  # type: ignore[arg-type]


def _digits() -> Images:
    """Read scikit-learn's 1,797 digits of 8 x 8 pixels in 17 levels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("--dataset digits needs its package: pip install scikit-learn") from None
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # (N, 8, 8, 1)
    return _split("digits", images, digits.target.astype(np.int64), levels=17)


def _fashion(folder: Path | None, cache: Path) -> Images:
    """Read Fashion-MNIST's four idx files from a folder, or download them."""
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
    """Read an array of bytes in MNIST's idx format, .gz or not. Raises InputError for another or an incomplete file."""
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
    """Read CIFAR-10's official binary version: an image is its label, then its red, green and blue values."""
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
    """Turn values (N, 3072), one colour after the other, into images (N, 32, 32, 3), and labels into int64."""
    return np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels.astype(np.int64)


def _imagenet32(folder: Path) -> Images:
    """Read ImageNet-32's official .npz batches (Chrabaszcz et al. 2017).

    A batch has `data` (N, 3072) uint8 and `labels` from 1 to 1000.
    """
    if not folder.is_dir():
        raise InputError(f"--archive {folder} must be the folder of the batch files")
    files = sorted(folder.glob("*train_data_batch_*.npz")), sorted(folder.glob("*val_data.npz"))
    if not all(files):
        raise InputError(
            f"--archive {folder} needs train_data_batch_1.npz and so on and val_data.npz: the .npz version of "
            "ImageNet-32, for the other one is made of pickles, which are not read here"
        )
    parts = []
    for side in files:
        batches = [_arrays(file, ("data", "labels")) for file in side]
        for file, batch in zip(side, batches):
            if batch["data"].dtype != np.uint8 or batch["data"].shape != (len(batch["labels"]), 3072):
                raise InputError(f"{file}: expected 'data' (N, 3072) of uint8 and N 'labels'")
        data, labels = (np.concatenate([batch[name] for batch in batches]) for name in ("data", "labels"))
        parts.append(_planes(data, labels - 1))
    (train, train_labels), (test, test_labels) = parts
    return Images("imagenet32", train, test, (_labels(folder, train_labels), _labels(folder, test_labels)), flip=True)


def _labels(path: Path, labels: np.ndarray) -> np.ndarray:
    """Return labels (N,) as int64. Raises InputError unless they are whole numbers from 0 on, below 100,000."""
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or labels.min() < 0 or labels.max() >= 100_000:
        raise InputError(f"--dataset {path}: labels must be whole numbers from 0 on, one for each image")
    return labels.astype(np.int64)


def _arrays(path: Path, wanted: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file. Raises InputError where it is damaged, or where a `wanted` array is missing."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged archive may raise anything
        raise InputError(f"{path} is not an .npz file that can be read: {described(error)}") from None
    for name in wanted:
        if name not in arrays:
            raise InputError(f"{path} has no array {name!r}, only {', '.join(arrays)}")
    return arrays


def _npz(path: Path) -> Images:
    """Read x_train (N, H, W, C) uint8, and y_train, x_test and y_test where they are there.

    (N, H, W) are grey images. An .npz may also hold image files, see `_decode_packed`.
    """
    arrays = _arrays(path)
    if "x_train" not in arrays and {"jpeg", "offset"} <= set(arrays):
        arrays = _decode_packed(path, arrays)
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


def _decode_packed(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Decode the image files in an .npz, and return the arrays x_train, y_train, x_test and y_test.

    jpeg: the bytes of all N files; offset (N + 1,): where each file begins and ends; label (N,) and split (N,), 0 for
    training and 1 for test, where they are there.
    """
    data, offset = arrays["jpeg"], arrays["offset"]
    rises = offset.ndim == 1 and offset.dtype.kind in "iu" and len(offset) > 1 and (offset[1:] >= offset[:-1]).all()
    if data.dtype != np.uint8 or data.ndim != 1 or not rises or offset[0] != 0 or offset[-1] != data.size:
        raise InputError(f"--dataset {path}: 'offset' must rise from 0 to the {data.size} bytes of 'jpeg'")
    count = len(offset) - 1
    images = image_files.stack(
        [(f"image {i} of {path}", data[offset[i] : offset[i + 1]].tobytes()) for i in range(count)], path
    )
    side, label = arrays.get("split", np.zeros(count)), arrays.get("label")
    if side.shape != (count,) or (label is not None and label.shape != (count,)):
        raise InputError(f"--dataset {path}: 'split' and 'label' must have one number for each of the {count} images")
    decoded = {}
    for number, name in enumerate(("train", "test")):
        chosen = side == number
        if chosen.any():
            decoded[f"x_{name}"] = images[chosen]
            decoded |= {f"y_{name}": label[chosen]} if label is not None else {}
    return decoded


def _folder(path: Path) -> Images:
    """Read every PNG and JPEG in a folder. Its subfolders are classes, unless an image lies in the folder itself.

    A folder of train and test (or val) has its own held-out images.
    """
    files, linked = walked(path)
    wanted = sorted((f for f in files if f.suffix.lower() in image_files.ENDINGS), key=image_files.by_number)
    if not wanted:
        raise InputError(f"--dataset {path} is a folder without {', '.join(image_files.ENDINGS)} files")
    sides = split.sides(path, wanted)
    every = [file for side in sides.values() for file in side]
    if left := counted([f for f in files if f not in set(every)], linked):
        print(f"{path} has {len(every):,} images; left out: {left}")
    images = image_files.stack([(str(file), file.read_bytes()) for file in every], path)
    labels, names = image_files.classes(sides)
    if names:
        print("classes: " + ", ".join(f"{number} {name}" for number, name in enumerate(names)))
    if len(sides) == 1:
        return _split(path.name, images, labels, class_names=names)
    (train, held_out), count = sides, len(next(iter(sides.values())))
    print(f"held out: the images in {held_out.name}; those in {train.name} are trained on")
    both = None if labels is None else (labels[:count], labels[count:])
    return Images(path.name, images[:count], images[count:], both, class_names=names)
