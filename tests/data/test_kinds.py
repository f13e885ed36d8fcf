"""What a folder, an encoding or an image file wraps around the data: read as it is meant, or refused by name."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from cadd_min.checkpoints.file import check_data
from cadd_min.data import corpus, documents, pairs, shards, tokenizer
from cadd_min.data.image_files import read_image
from cadd_min.data.images import chosen, open_images
from cadd_min.data.token_folder import prepare
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.utils.errors import InputError
from tests.data.test_token_folder import CODEC, texts


def read(path) -> list[str]:
    """Read the documents of a corpus."""
    found, text = [], ""
    for part in corpus.open_corpus(str(path), path.parent).parts():
        for piece in corpus.read(part):
            text += piece.text
            if piece.last:
                found, text = [*found, text], ""
    return found


# ------------------------------------------------------------------------------------------------ text


def test_marks_and_line_ends_are_no_text(tmp_path, monkeypatch):
    """Read a BOM, CRLF and CR across borders of blocks: no text has them, and a BOM within a text stays."""
    monkeypatch.setattr(documents, "PIECE", 5)
    (tmp_path / "a.TXT").write_bytes("\ufeffone\r\ntwo\rthr\ufeffee\r\n".encode())
    assert read(tmp_path / "a.TXT") == ["one\ntwo\nthr\ufeffee\n"]
    (tmp_path / "b.txt").write_bytes("one".encode("utf-16"))
    with pytest.raises(InputError, match=r"b\.txt is UTF-16 text: save it as UTF-8"):
        read(tmp_path / "b.txt")


def test_a_folder_says_what_it_leaves_out(tmp_path):
    for name in ("a.txt", "b.TXT", "c.Md", "d.csv", "e.CSV", "f", ".hidden.txt"):
        (tmp_path / name).write_text("a text")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "g.ndjson").write_text('{"text": "h"}\n{"text": " "}\n')
    (tmp_path / "link").symlink_to(tmp_path / "below")
    opened = corpus.open_corpus(str(tmp_path), tmp_path)
    assert opened.note.endswith("has 2 .txt, 1 .ndjson, 1 .md; left out: 2 .csv, 1 without an ending, 1 linked folders")
    tokens = prepare(opened, tokenizer.chars("a texh"), tmp_path / "cache")
    assert tokens.documents() == "4 documents (1 empty ones left out), 4.3% of the tokens held out"
    with pytest.raises(InputError, match=r"d\.csv must end in \.txt, .*: name it \.txt to train on it as plain text"):
        corpus.open_corpus(str(tmp_path / "d.csv"), tmp_path)


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf", b"\r\n"])
def test_a_file_without_a_word_is_an_empty_document(content, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.md"):
        (tmp_path / "texts" / name).write_bytes(content)
    (tmp_path / "texts" / "c.txt").write_text("a b\n<|endoftext|>\n")
    tokens = prepare(corpus.open_corpus(str(tmp_path / "texts"), tmp_path), tokenizer.chars("ab "), tmp_path / "cache")
    assert tokens.documents().startswith("1 documents (2 empty ones left out)")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_empty_documents_are_left_out_alike(kind, tmp_path):
    texts = ["a", "", " ", "b"]
    path = tmp_path / f"x.{kind}"
    if kind == "txt":
        path.write_text("<|endoftext|>".join(texts))
    elif kind == "jsonl":
        path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    tokens = prepare(corpus.open_corpus(str(path), tmp_path), tokenizer.chars("ab"), tmp_path / "cache")
    assert tokens.documents().startswith("2 documents (2 empty ones left out), ")
    assert tokens.read(0, 4).tolist() == [0, 2, 1, 2]  # a, end, b, end


@pytest.mark.parametrize("column", [[["a"]], [{"s": "a"}]])
def test_a_column_of_no_strings_is_refused(column, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"its column 'text' must hold strings, not (list|struct)"):
        read(tmp_path / "x.parquet")


def test_the_sizes_are_of_the_column_that_is_read(tmp_path):
    """Write a nested column before the text: the text's sizes are found all the same."""
    table = pyarrow.table({"a": [{"x": 1, "y": "q" * 9999}], "text": ["b" * 99]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False)
    assert documents.spans(str(tmp_path / "x.parquet"))[0].size < 999


def test_a_run_of_spaces_that_tiktoken_cannot_encode_is_a_sentence():
    with pytest.raises(InputError, match="a run of spaces or newlines is too long for tiktoken"):
        tokenizer.gpt2(300).encode("a" + " " * 1_500_000)


def test_ids_above_the_mask_have_room():
    """The mask of a pretrained model may be any id: the type is that of the largest one."""

    class Many(Tokenizer):
        vocab_size, mask_id = 70_000, 4

    assert shards.token_type(Many()) == np.uint32
    assert shards.token_type(tokenizer.gpt2(512)) == np.uint16


def test_pairs_behind_a_bom_are_pairs(tmp_path):
    path = tmp_path / "p.JSONL"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "response": "b"}\n')
    assert pairs.holds_pairs(path) and pairs.read_pairs(path)[0][:2] == ("a", "b")


# ------------------------------------------------------------------------------------------------ identity


def test_a_digest_follows_the_content_alone(tmp_path):
    """Check that another name or time changes nothing, and that one more document does."""
    digests = []
    for name, text in (("a", "x<|endoftext|>y"), ("b", "x<|endoftext|>y"), ("c", "z<|endoftext|>x<|endoftext|>y")):
        (tmp_path / f"{name}.txt").write_text(text)
        opened = corpus.open_corpus(str(tmp_path / f"{name}.txt"), tmp_path)
        digests.append(prepare(opened, tokenizer.chars("xyz"), tmp_path / "cache").digest())
    assert digests[0] == digests[1] != digests[2]
    content = {"data": digests[0]}
    check_data(content, digests[1], "it", False)
    check_data({}, digests[2], "it", False)  # an old run does not know
    check_data(content, digests[2], "it", True)
    with pytest.raises(InputError, match=r"it has changed since the run was trained on it.*--anyway"):
        check_data(content, digests[2], "it", False)


def test_a_run_refuses_data_that_is_not_its_own(call, tmp_path):
    """Put a document in front of the data: evaluate.py and --resume refuse it, and take it with --anyway."""
    text = tmp_path / "d.txt"
    text.write_text("<|endoftext|>".join(f"the {n} words of a document " * 40 for n in range(60)))
    tiny = "--preset nano --length 16 --vocab-size 300 --batch-size 4 --steps 2 --dtype float32"
    assert call(f"train_text.py --dataset {text} {tiny} --out run")[0] == 0
    assert call("evaluate.py bound --ckpt run --num 4")[0] == 0
    text.write_text("one more<|endoftext|>" + text.read_text())
    for command in ("evaluate.py bound --ckpt run --num 4", "train_text.py --resume --out run --steps 4"):
        code, _, err = call(command)
        assert code == 2 and "has changed since the run was trained on it" in err.splitlines()[-1]
        assert call(f"{command} --anyway")[0] == 0
    code, _, err = call(f"train_text.py --dataset {text} {tiny} --out new --anyway")
    assert code == 2 and "--anyway goes with --resume" in err


# ------------------------------------------------------------------------------------------------ images


def png(path, image) -> bytes:
    image.save(path)
    return path.read_bytes()


def test_an_image_is_read_as_a_viewer_shows_it(tmp_path):
    """Read orientation, transparency and palettes. Orientation 6 turns an image by a quarter."""
    upper = np.zeros((4, 4, 3), np.uint8)
    upper[:2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(upper).save(tmp_path / "e.png", exif=exif)
    assert np.array_equal(read_image((tmp_path / "e.png").read_bytes(), "e"), np.rot90(upper, -1))
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert (read_image(png(tmp_path / "t.png", clear), "t") == 255).all()
    grey = Image.fromarray(np.full((2, 2), 7, np.uint8)).convert("P")
    assert read_image(png(tmp_path / "p.png", grey), "p").shape == (2, 2, 1)
    assert read_image(png(tmp_path / "r.png", Image.new("RGB", (2, 2), (7, 7, 7))), "r").shape == (2, 2, 3)


def test_classes_are_numbered_by_their_names_as_numbers(tmp_path, capsys):
    for name in range(12):
        (tmp_path / "p" / str(name)).mkdir(parents=True)
        for n in range(2):
            Image.new("L", (4, 4), 20 * name).save(tmp_path / "p" / str(name) / f"{n}.png")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "p" / "3" / "coloured.png")
    (tmp_path / "p" / "notes.txt").write_text("")
    data = open_images(str(tmp_path / "p"), tmp_path)
    assert data.class_names == tuple(map(str, range(12))) and data.train.shape[3] == 3
    for image, label in zip(data.train, data.labels[0]):
        assert image[0, 0, 0] in (20 * label, 1)
    out = capsys.readouterr().out
    assert "classes: 0 0, 1 1, 2 2" in out and "25 images; left out: 1 .txt" in out
    assert open_images(str(tmp_path / "p"), tmp_path).digest() == data.digest()


def test_some_of_ordered_data_stand_for_all_of_it():
    """Choose 40 of 400 rows in the order of 10 classes: all classes are there, and twice the same rows."""
    labels = np.repeat(np.arange(10), 40)
    assert len(set(labels[chosen(400, 40)])) == 10 and np.array_equal(chosen(400, 40), chosen(400, 40))
    assert sorted(chosen(7, 99)) == list(range(7))


def picture(path, level: int) -> None:
    Image.fromarray(np.full((4, 4), level, np.uint8)).save(path)


def test_hidden_and_linked_images_are_no_images_of_the_folder(tmp_path, capsys):
    """A Mac leaves ._IMG_1.jpg beside IMG_1.jpg, which is no picture. Links are not followed, and are counted."""
    (tmp_path / "p").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for number in range(6):
        picture(tmp_path / "p" / f"IMG_{number}.PNG", 7)
        (tmp_path / "p" / f"._IMG_{number}.PNG").write_bytes(b"no picture")
    (tmp_path / "p" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "p" / "IMG_7.HEIC").write_bytes(b"x")
    data = open_images(str(tmp_path / "p"), tmp_path)
    assert len(data.train) + len(data.held_out) == 6
    assert "has 6 images; left out: 1 .heic, 1 linked folders" in capsys.readouterr().out


def test_texts_in_a_folder_of_its_own_for_tests_are_held_out(tmp_path):
    folder = tmp_path / "corpus"
    for name in ("train/a.txt", "train/b/c.txt", "test/d.txt", "val/e.txt", "drafts/f.txt", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the text of {name}")
    opened = corpus.open_corpus(str(folder), tmp_path)
    assert opened.note.endswith("has 3 .txt; left out: 2 .txt, 1 .md; the texts in test are held out")
    tokens = prepare(opened, CODEC, tmp_path)
    assert texts(tokens.split("train")) == ["the text of train/a.txt", "the text of train/b/c.txt"]
    assert texts(tokens.split("val")) == ["the text of test/d.txt"]
    (folder / "test" / "d.txt").write_text("")
    empty = prepare(corpus.open_corpus(str(folder), tmp_path), CODEC, tmp_path)
    assert len(empty.split("val")) == 0  # nothing of train takes its place


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "val"), ("train", "valid")])
@pytest.mark.parametrize("labelled", [True, False])
def test_folders_of_train_and_test_have_their_own_held_out_images(names, labelled, tmp_path, capsys):
    """The grey level of a picture is 10 times its class, plus 100 where it is held out."""
    for side, name in enumerate(names):
        for number in range(12 - side):
            folder = tmp_path / name / (f"{number % 11}" if labelled else "")
            folder.mkdir(parents=True, exist_ok=True)
            picture(folder / f"{number}.png", 10 * (number % 11) + 100 * side)
    data = open_images(str(tmp_path), tmp_path)
    assert (len(data.train), len(data.held_out)) == (12, 11)
    assert data.train.max() <= 100 and data.held_out.min() >= 100
    out = capsys.readouterr().out
    assert f"held out: the images in {names[1]}; those in {names[0]} are trained on" in out
    if labelled:
        assert data.class_names == tuple(map(str, range(11)))
        for images, labels, more in zip((data.train, data.held_out), data.labels, (0, 100)):
            assert np.array_equal(images[:, 0, 0, 0], 10 * labels + more)


def test_of_test_and_val_test_is_held_out_and_the_other_is_counted(tmp_path, capsys):
    for name, count in (("train", 3), ("test", 2), ("val", 4)):
        (tmp_path / name).mkdir()
        for number in range(count):
            picture(tmp_path / name / f"{number}.png", 7)
    data = open_images(str(tmp_path), tmp_path)
    assert (len(data.train), len(data.held_out)) == (3, 2) and "left out: 4 .png" in capsys.readouterr().out


def test_a_class_of_held_out_images_alone_is_one_sentence(tmp_path):
    for name in ("train/a", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        picture(tmp_path / name / "x.png", 7)
    with pytest.raises(InputError, match="the class b has held-out images, and none to train on"):
        open_images(str(tmp_path), tmp_path)


def test_folders_of_other_names_are_classes(tmp_path):
    for name in ("train", "plane"):
        (tmp_path / name).mkdir()
        for number in range(6):
            picture(tmp_path / name / f"{number}.png", 7)
    assert open_images(str(tmp_path), tmp_path).class_names == ("plane", "train")
