"""Check images to tokens and back, the format of each data set, and the errors for files that are wrong."""

import gzip
import hashlib
import io
import struct
import tarfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cadd_min.data import images
from cadd_min.data.image_files import read_image
from cadd_min.data.images import HELD_OUT, open_images
from cadd_min.data.pixels import Pixels
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import download


def noise(*shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "PNG")
    return file.getvalue()


@given(st.integers(2, 256), st.sampled_from([(2, 3, 1), (3, 2, 3)]))
def test_tokens_to_images_and_back_without_loss(levels, shape):
    pixels = Pixels(shape, levels)
    x = torch.randint(levels, (5, pixels.length), generator=torch.Generator().manual_seed(levels))
    x[0, 0], x[0, 1] = 0, levels - 1
    decoded = pixels.decode(x)
    assert decoded.shape == (5, *shape) and decoded.dtype == np.uint8
    assert (decoded[0, 0].flatten()[0], decoded.reshape(5, -1)[0, 1]) == (0, 255)  # black and white
    assert torch.equal(pixels.encode(decoded), x)
    assert Pixels.from_spec(pixels.spec()) == pixels
    x[:, 1] = pixels.mask_id
    assert (pixels.decode(x).reshape(5, -1)[:, 1] == 0).all()


def test_256_levels_are_the_bytes_themselves():
    image = noise(4, 3, 5, 3)
    x = Pixels((3, 5, 3)).encode(image)
    assert np.array_equal(x.numpy(), image.reshape(4, -1)) and np.array_equal(Pixels((3, 5, 3)).decode(x), image)
    with pytest.raises(InputError, match=r"must be of the shape \(3, 5, 3\), not \(3, 5, 1\)"):
        Pixels((3, 5, 3)).encode(image[..., :1])


def test_digits_are_what_scikit_learn_has(tmp_path):
    from sklearn.datasets import load_digits

    data, digits = open_images("digits", tmp_path), load_digits()
    assert data.levels == 17 and data.classes() == 10 and len(data.train) + len(data.held_out) == 1797
    x = data.pixels().encode(data.held_out).view(-1, 8, 8)
    assert np.array_equal(x.numpy(), digits.images[HELD_OUT - 1 :: HELD_OUT])
    assert np.array_equal(data.labels[1], digits.target[HELD_OUT - 1 :: HELD_OUT])


def write_idx(path, array):
    path.write_bytes(gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()))


def test_idx_files(tmp_path):
    arrays = {}
    for part, count in (("train", 7), ("t10k", 3)):
        arrays[part] = noise(count, 5, 4, seed=count), noise(count, seed=count) % 10
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", arrays[part][0])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", arrays[part][1])
    data = open_images("fashion-mnist", tmp_path, tmp_path)
    for part, image, label in zip(arrays, (data.train, data.held_out), data.labels):
        assert np.array_equal(image[..., 0], arrays[part][0]) and np.array_equal(label, arrays[part][1])
    whole = gzip.decompress((tmp_path / "train-images-idx3-ubyte.gz").read_bytes())
    for damaged, message in (
        (whole[:-1], "should hold an array"),
        (b"\x89PNG1234", "not an idx file"),
        (b"", "not an"),
    ):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(damaged))
        with pytest.raises(InputError, match=message):
            open_images("fashion-mnist", tmp_path, tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(InputError, match="cannot read the idx file"):
        open_images("fashion-mnist", tmp_path, tmp_path)
    with pytest.raises(InputError, match=r"cannot read the idx file .*none"):
        (tmp_path / "none").mkdir()
        open_images("fashion-mnist", tmp_path, tmp_path / "none")


def test_cifar10s_archive_and_its_checksum(tmp_path, monkeypatch):
    path, image, label = tmp_path / "cifar.tar.gz", noise(6, 32, 32, 3), np.arange(6, dtype=np.uint8)
    records = np.concatenate([label[:, None], image.transpose(0, 3, 1, 2).reshape(6, -1)], 1)
    with tarfile.open(path, "w:gz") as archive:
        for i, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = records[i].nbytes
            archive.addfile(info, io.BytesIO(records[i].tobytes()))
    with pytest.raises(InputError, match=r"has the MD5 checksum .*, expected c32a1d4ab5d03f1284b67883e8d87530"):
        open_images("cifar10", tmp_path, path)
    monkeypatch.setattr(images, "CIFAR10_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    data = open_images("cifar10", tmp_path, path)
    assert np.array_equal(data.train, image[:5]) and np.array_equal(data.held_out, image[5:]) and data.flip
    assert data.labels[0].tolist() == [0, 1, 2, 3, 4] and data.labels[1].tolist() == [5]


def test_imagenet32s_batch_files(tmp_path):
    image = noise(5, 32, 32, 3)
    planes = image.transpose(0, 3, 1, 2).reshape(5, -1)
    np.savez(tmp_path / "train_data_batch_1.npz", data=planes[:2], labels=np.array([1, 1000]))
    np.savez(tmp_path / "train_data_batch_2.npz", data=planes[2:4], labels=np.array([7, 8]))
    with pytest.raises(InputError, match=r"val_data\.npz.*pickles"):
        open_images("imagenet32", tmp_path, tmp_path)
    np.savez(tmp_path / "val_data.npz", data=planes[4:], labels=np.array([3]))
    data = open_images("imagenet32", tmp_path, tmp_path)
    assert np.array_equal(data.train, image[:4]) and data.labels[0].tolist() == [0, 999, 6, 7]
    np.savez(tmp_path / "val_data.npz", data=planes[4:, :100], labels=np.array([3]))
    with pytest.raises(InputError, match=r"expected 'data' \(N, 3072\)"):
        open_images("imagenet32", tmp_path, tmp_path)
    with pytest.raises(InputError, match="needs --archive"):
        open_images("imagenet32", tmp_path)


def test_an_npz_file(tmp_path):
    image, label = noise(10, 4, 6, 3), np.arange(10) % 3
    np.savez(tmp_path / "a.npz", x_train=image, y_train=label)
    data = open_images(str(tmp_path / "a.npz"), tmp_path)
    assert np.array_equal(data.held_out, image[4::5]) and len(data.train) == 8 and data.classes() == 3
    np.savez(tmp_path / "b.npz", x_train=image[..., 0], x_test=image[:2, :, :, 0])
    data = open_images(str(tmp_path / "b.npz"), tmp_path)
    assert data.train.shape == (10, 4, 6, 1) and len(data.held_out) == 2 and data.labels is None


def test_packed_and_loose_image_files(tmp_path):
    image = noise(10, 4, 6, 3)
    files = [png(picture) for picture in image]
    pack = {"jpeg": np.frombuffer(b"".join(files), np.uint8), "offset": np.cumsum([0, *map(len, files)])}
    split, label = (np.arange(10) >= 7).astype(np.uint8), np.arange(10) % 4
    np.savez(tmp_path / "pack.npz", **pack, split=split, label=label)
    data = open_images(str(tmp_path / "pack.npz"), tmp_path)
    assert np.array_equal(data.train, image[:7]) and np.array_equal(data.held_out, image[7:])
    assert data.labels[1].tolist() == [3, 0, 1]
    for i, file in enumerate(files):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(file)
    data = open_images(str(tmp_path / "photos"), tmp_path)
    assert data.classes() == 2 and data.train.shape == (8, 4, 6, 3)  # a, then b: 0 2 4 6 8 | 1 3 5 7 9
    assert np.array_equal(data.held_out, image[[8, 9]]) and data.labels[1].tolist() == [0, 1]
    (tmp_path / "photos" / "b" / "x.png").write_bytes(png(noise(4, 7, 3)))
    with pytest.raises(InputError, match=r"mixed sizes, 4x6 and 4x7 \(.*x\.png\)"):
        open_images(str(tmp_path / "photos"), tmp_path)
    (tmp_path / "photos" / "b" / "x.png").write_bytes(files[0][:50])
    with pytest.raises(InputError, match=r"x\.png is not an image"):
        open_images(str(tmp_path / "photos"), tmp_path)
    assert read_image(png(noise(3, 2, 1)), "grey").shape == (3, 2, 1)
    with pytest.raises(InputError, match="deep has more than 8 bits a colour"):
        read_image(png(noise(3, 2, dtype=np.uint16)), "deep")


IMAGE = noise(10, 4, 4, 3)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": IMAGE}, "no array 'x_train', only images"),
        ({"x_train": IMAGE / 255}, r"must be \(N, H, W, 1 or 3\) of uint8, not \(10, 4, 4, 3\) of float64"),
        ({"x_train": IMAGE[0, 0]}, r"must be \(N, H, W, 1 or 3\)"),
        ({"x_train": noise(10, 4, 4, 2)}, r"must be \(N, H, W, 1 or 3\)"),
        ({"x_train": IMAGE[:0]}, r"must be \(N, H, W, 1 or 3\)"),
        ({"x_train": IMAGE[:3]}, "has 3 images: at least 5"),
        ({"x_train": IMAGE, "x_test": noise(3, 5, 4, 3)}, "images of mixed sizes"),
        ({"x_train": IMAGE, "y_train": np.arange(9)}, r"has 10 images and labels of the shape \(9,\)"),
        ({"x_train": IMAGE, "y_train": np.arange(10) - 1}, "labels must be whole numbers from 0 on"),
        ({"x_train": IMAGE, "y_train": np.arange(10) / 2}, "labels must be whole numbers from 0 on"),
        ({"jpeg": IMAGE.flatten(), "offset": np.array([0, 5, 3])}, "'offset' must rise"),
        ({"jpeg": IMAGE.flatten(), "offset": np.array([0, 480])}, "image 0 of .* is not an image"),
        ({"x_train": np.array([None, 3])}, "not an .npz file that can be read"),
    ],
)
def test_a_wrong_npz_is_one_sentence(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=message) as error:
        open_images(str(tmp_path / "x.npz"), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a zip at all", b"PK\x03\x04cut short"])
def test_a_file_that_is_no_npz(content, tmp_path):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"not an \.npz file"):
        open_images(str(tmp_path / "x.npz"), tmp_path)


@contextmanager
def broken_server():
    """Serve one file that is announced as 1,000 bytes and breaks off after 300."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 300)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/file"


def test_a_download_that_breaks_or_differs_leaves_nothing(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 1000)
    for url, md5, message in (
        (source.as_uri(), "0" * 32, "has the MD5 checksum"),
        ("http://127.0.0.1:9/none", None, "could not download it .* by hand"),
    ):
        with pytest.raises(InputError, match=message):
            download(url, tmp_path / "cache" / "file", "it", md5)
        assert list((tmp_path / "cache").iterdir()) == []
    with broken_server() as url, pytest.raises(InputError, match="it broke off after 300 of 1,000 bytes"):
        download(url, tmp_path / "cache" / "file", "it")
    assert list((tmp_path / "cache").iterdir()) == []
    right = hashlib.md5(b"x" * 1000).hexdigest()
    assert download(source.as_uri(), tmp_path / "cache" / "file", "it", right).read_bytes() == b"x" * 1000
    (tmp_path / "cache" / "file").write_bytes(b"damaged since")
    with pytest.raises(InputError, match="has the MD5 checksum"):
        download(source.as_uri(), tmp_path / "cache" / "file", "it", right)
