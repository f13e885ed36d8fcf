"""Check the way from files to token files to batches: no text is lost, and no file is left half written."""

import json
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cadd_min.data import corpus, documents, shards, tokenizer
from cadd_min.data import token_folder as data
from cadd_min.data.corpus import open_corpus
from cadd_min.data.split import ONE_IN, held_out
from cadd_min.data.token_folder import TokenFolder, TokenView, prepare
from cadd_min.utils.errors import InputError

CODEC = tokenizer.gpt2(300)
DOCS = [f"Document number {i}. It has a few words, ünïcode too." for i in range(45)]


def read(path: Path, cache: Path, codec=CODEC) -> TokenFolder:
    return prepare(open_corpus(str(path), cache), codec, cache)


def texts(tokens: TokenView, codec=CODEC) -> list[str]:
    return [text for text in codec.decode(tokens[:].tolist()).split("<|endoftext|>") if text]


def content(folder: TokenFolder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.path.iterdir()}


def words_of(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(count))


def write(kind: str, folder: Path) -> Path:
    path = folder / f"docs.{kind}"
    if kind == "txt":
        path.write_text("\n<|endoftext|>\n".join(DOCS), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": d, "id": 1}) for d in DOCS), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": DOCS}), path)
    else:
        path = folder / "many"
        path.mkdir()
        (path / "notes.csv").write_text("not a document")
        for i, doc in enumerate(DOCS[:-1]):
            (path / f"{i:03}.txt").write_text(doc, encoding="utf-8")
        (path / "last.jsonl").write_text(json.dumps({"text": DOCS[-1]}), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "folder"])
def test_every_kind_of_file_gives_the_same_documents(kind, tmp_path):
    tokens = read(write(kind, tmp_path), tmp_path / "cache")
    assert texts(tokens.split("val")) == [doc for doc in DOCS if held_out(doc)]
    assert texts(tokens.split("train")) == [doc for doc in DOCS if not held_out(doc)]
    assert all(tokens.split(split)[:][-1] == CODEC.eot_id for split in ("train", "val"))


def test_second_run_reads_the_cache(tmp_path, monkeypatch):
    path = write("txt", tmp_path)
    first = read(path, tmp_path)
    monkeypatch.setattr(data, "write_folder", lambda *a: pytest.fail("tokenised again"))
    assert read(path, tmp_path).path == first.path
    assert TokenFolder(first.path).tokenizer().fingerprint() == CODEC.fingerprint()  # from the folder's spec


def test_changed_text_or_tokenizer_is_tokenised_again(tmp_path):
    path = write("txt", tmp_path)
    first = read(path, tmp_path).path
    assert read(path, tmp_path, tokenizer.gpt2(301)).path != first
    path.write_text("Other text. " * 50)
    assert read(path, tmp_path).path != first


def test_half_written_and_foreign_caches_are_never_used(tmp_path, capsys, monkeypatch):
    path = write("txt", tmp_path)
    intact = read(path, tmp_path)
    tokens, index, good = intact.path / "00000.bin", intact.path / "index.json", content(intact)
    for file, damage in [
        (tokens, good["00000.bin"][:-7]),
        (tokens, b""),
        (tokens, None),
        (index, good["index.json"][:-7]),
        (index, b"[]"),
        (index, b"garbage" * 100),
    ]:
        file.unlink() if damage is None else file.write_bytes(damage)
        with pytest.raises(InputError, match=f"{file.name}.* (cut short|No such file|damaged)"):
            TokenFolder(intact.path)
        assert content(read(path, tmp_path)) == good  # made again
    index.write_bytes(good["index.json"].replace(b'"bpe"', b'"foo"'))
    assert content(read(path, tmp_path)) == good
    assert "another tokenizer" in capsys.readouterr().out

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        read(path, tmp_path, tokenizer.gpt2(302))
    assert [file.name for file in tmp_path.glob("*bpe302*/*")] == ["lock"]


def test_long_documents_are_cut_where_tokens_do_not_change(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 50)
    text = "The quick  brown fox, it's said, jumps over 12345 lazy dogs.\n\nAnd again " * 30
    path = tmp_path / "long.txt"
    path.write_text(text)
    tokens = read(path, tmp_path)
    joined = [*tokens.split("train")[:], *tokens.split("val")[:]]
    assert joined == [*CODEC.encode(text), CODEC.eot_id]
    assert len(tokens.split("val")) == len(joined) // ONE_IN  # one document: the last 5% of its tokens


def test_characters(tmp_path):
    path = tmp_path / "c.txt"
    path.write_text("abba cab")
    source = open_corpus(str(path), tmp_path)
    codec = tokenizer.chars(corpus.alphabet(source))
    assert codec.alphabet == " abc"
    assert read(path, tmp_path, codec).split("train")[:].tolist() == [1, 2, 2, 1, 0, 3, 1, 2, 4]


def test_text8_is_read_from_its_archive_and_split_90_5_5(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
        archive.writestr("text8", "the cat sat on a mat " * 100)
    source = open_corpus("text8", tmp_path)
    assert source.tokenizer == "chars"
    tokens = prepare(source, tokenizer.chars(corpus.alphabet(source)), tmp_path)
    sizes = [len(tokens.split(s)) for s in ("train", "val", "test")]
    assert sum(sizes) == 2101 and sizes[0] == 1891 and abs(sizes[1] - sizes[2]) <= 1


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.txt", b"", "is empty"),
        ("binary.txt", b"ab\0cd" * 100, "binary"),
        ("latin.txt", "café".encode("latin-1") * 10, "not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not valid JSON"),
        ("bad.jsonl", b'{"txt": "a"}\n', "line 1: expected an object with a string 'text'"),
        ("bad.parquet", b"PAR1 no", "not a readable .parquet"),
    ],
)
def test_bad_files_are_named(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(path, tmp_path / "cache")
    assert {file.name for file in (tmp_path / "cache").glob("*/*")} <= {"lock"}


def test_missing_things_are_named(tmp_path):
    with pytest.raises(InputError, match=r"sotu, shakespeare, text8, owt, moses, sudoku or a path"):
        open_corpus("stou", tmp_path)
    with pytest.raises(InputError, match=r"folder without \.txt, \.text, \.md, \.jsonl, \.ndjson, \.parquet"):
        open_corpus(str(tmp_path), tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="no column 'text'"):
        read(tmp_path / "x.parquet", tmp_path)


def test_a_failed_download_says_how_to_help(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SHAKESPEARE", "http://127.0.0.1:9/none.txt")
    with pytest.raises(InputError, match="by hand"):
        open_corpus("shakespeare", tmp_path)
    assert os.listdir(tmp_path) == []


def test_openwebtext_without_its_library_or_network_says_how_to_help(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"pip install datasets|could not read Skylion007/openwebtext .* by hand"):
        open_corpus("owt", tmp_path).parts()


def test_openwebtext_is_read_from_the_files_that_its_library_finds(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    folder = tmp_path / "set" / "plain_text"
    folder.mkdir(parents=True)
    for i in range(2):
        docs = pyarrow.table({"text": DOCS[20 * i : 20 * i + 20]})
        pyarrow.parquet.write_table(docs, folder / f"train-0000{i}-of-00002.parquet", row_group_size=5)
    monkeypatch.setattr(corpus, "OWT", str(tmp_path / "set"))
    parts = open_corpus("owt", tmp_path).parts()
    assert [piece.text for part in parts for piece in corpus.read(part)] == DOCS[:40]


def test_a_text_goes_on_where_the_network_failed(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.local import LocalFileSystem

    class Unreliable(LocalFileSystem):
        """A file system whose connection breaks `failures` times in the middle of a file."""

        protocol, failures = "unreliable", 0

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix("unreliable://"))

        def _open(self, path, mode="rb", **options):
            file = super()._open(path, mode, **options)
            file.read = lambda *size: self.check(file) or file.f.read(*size)
            return file

        def check(self, file):
            if Unreliable.failures and 0.4 < file.tell() / size < 0.6:
                Unreliable.failures -= 1
                raise ConnectionError("broken off")

    docs, waits = [words_of(i, 500) for i in range(1000)], []
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": docs}), path, row_group_size=20)
    size = path.stat().st_size
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    monkeypatch.setattr(documents.time, "sleep", waits.append)
    (span,) = documents.spans(f"unreliable://{path}")
    Unreliable.failures = 2
    assert [piece.text for piece in documents.pieces(span)] == docs and waits == [1, 3]
    Unreliable.failures = documents.TRIES
    with pytest.raises(InputError, match=r"a\.parquet cannot be read: .*broken off"):
        list(documents.pieces(span))
