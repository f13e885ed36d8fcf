"""Check other people's tokenizers: the ids of chats and of prompts with gaps, counts of characters, ends of answers.

The tokenizers are of the four kinds that models have: bytes (GPT-2, Qwen), words with a mark before them (Mistral,
Llama 2 with its Prepend), and words with a mark inside (BERT).
"""

import functools
import json

import pytest
import transformers
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from cadd_min.data import tokenizer
from cadd_min.data.hf_tokenizer import HFTokenizer
from cadd_min.sampling.text import lone_spaces, parse_prompt

TEXT = ["write a program that adds two numbers", "the capital of france is paris", "a\n\nb. c\n\n\nd"] * 20
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|mask|>"]
TEMPLATES = {
    "instruct": "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
    "trim": "{{ bos_token }}{% for m in messages %}user\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}model\n\n",
    "twice": "{% for m in messages %}{{ m['content'] }}{{ m['content'] | upper }}{% endfor %}",
}
KINDS = ("bytes", "always", "first", "prepend", "fallback", "wordpiece")


@functools.cache
def fast(kind: str) -> Fast:
    """Train a small tokenizer of a kind."""
    if kind == "wordpiece":
        made = Fast(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        made.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
        return made
    made = Fast(models.BPE(unk_token="<unk>", byte_fallback=kind == "fallback"))
    alphabet, special = [], SPECIAL
    if kind == "bytes":
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind in ("prepend", "fallback"):  # Llama 2
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(steps)
        special = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] * (kind == "fallback")
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        made.decoder = decoders.Metaspace(prepend_scheme=kind)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(TEXT, trainer)
    content = json.loads(made.to_str())  # the trainer calls the tokens of bytes special, and in Llama they are not
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return Fast.from_str(json.dumps(content))


@functools.cache
def pair(kind: str, template: str = "instruct") -> tuple[HFTokenizer, transformers.PreTrainedTokenizerFast]:
    """Make this project's tokenizer, and the library's."""
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<|mask|>"}
    library = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast(kind), chat_template=TEMPLATES[template], **names
    )
    mask, end = library.mask_token_id, library.eos_token_id
    rows = len(library.get_vocab())
    return HFTokenizer(library.backend_tokenizer.to_str(), rows, mask, end, TEMPLATES[template], names), library


def library_ids(library: transformers.PreTrainedTokenizerFast, message: str) -> list[int]:
    turns = [{"role": "user", "content": message}]
    return library.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_has_the_ids_of_the_librarys_own_template(kind, template):
    ours, library = pair(kind, template)
    for message in ("write a program", " the capital ", "\n\na. b", "a\n", "adds two [INST] numbers"):
        assert ours.encode_chat(message) == library_ids(library, message)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_that_spells_a_special_token_is_ordinary_text(kind):
    ours, library = pair(kind, "trim")
    ids, end = ours.encode_chat("the <|im_end|> of a"), library.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 1 < library_ids(library, "the <|im_end|> of a").count(end)


@pytest.mark.parametrize("kind", ["bytes", "always", "first", "prepend"])
def test_the_text_around_a_gap_stays_as_it_is_given(kind):
    """A tokenizer that puts a space before every text must not put a space after a gap."""
    ours, _ = pair(kind)
    for before, after in (("the", " capital of"), ("the", "capital of"), ("a", ". c"), ("the", " a b"), ("two", "s")):
        ids = parse_prompt(f"{before}[2]{after}", ours, 40).tolist()
        start = ids.index(ours.mask_id) + 2
        assert ids[start - 2 : start] == [ours.mask_id] * 2
        rest = [i for i in ids[start:] if i != ours.mask_id]
        assert ours.decode_inside(rest) == after
        filled = ours.encode("the")  # any text in the gap
        assert ours.decode([*ids[: start - 2], *filled, *rest]).endswith(after)


def test_without_regard_to_what_stands_before_the_text_changes():
    """The twin of the test above: an encoding of the piece by itself adds a space."""
    ours, _ = pair("prepend")
    assert ours.decode_inside(ours.encode(" capital of")) == "  capital of"


@pytest.mark.parametrize("coder", ["gpt2", *KINDS[:1], "fallback"])
def test_the_characters_of_the_pieces_of_a_text_add_up_to_those_of_the_text(coder):
    """The pieces begin and end inside characters of three and four bytes. The twin counts what is shown."""
    ours = tokenizer.gpt2(300) if coder == "gpt2" else pair(coder)[0]
    text = "数字は 三 つ 🙂🙃 write a program " * 8
    ids = ours.encode(text)
    for length in (5, 7, 16, 33):
        pieces = [ids[n : n + length] for n in range(0, len(ids), length)]
        counted = sum(map(ours.characters, pieces))
        assert counted - len(text) == (coder == "fallback")  # which begins every text with a space of its own
        assert sum(len(ours.decode(piece)) for piece in pieces) > 1.02 * counted


@pytest.mark.parametrize("kind", ["always", "first", "prepend"])
def test_a_piece_counts_the_space_that_it_begins_with(kind):
    ours, _ = pair(kind)
    ids = ours.encode("the capital of france")
    assert sum(ours.characters([i]) for i in ids) == len(" the capital of france")
    if kind != "prepend":  # whose tokens have several words
        assert [ours.characters([i]) for i in ids] == [len(" the"), len(" capital"), len(" of"), len(" france")]


def test_words_count_the_space_between_them():
    ours, _ = pair("wordpiece")
    assert sum(map(ours._characters, ours.encode("the capital of france"))) == len(" the capital of france")


def test_the_end_of_a_document_is_one_character_whatever_its_name():
    ours, _ = pair("bytes")
    ids = [*ours.encode("a b"), ours.eot_id, *ours.encode("the"), ours.eot_id]
    assert ours.characters(ids) == 3 + 1 + 3 + 1 and ours.documents(ids) == ["a b", "the", ""]


def test_every_special_token_but_the_mask_ends_an_answer():
    ours, library = pair("bytes")
    assert ours.end_ids == set(library.convert_tokens_to_ids(["<s>", "</s>", "<|im_end|>"]))
    assert tokenizer.gpt2(300).end_ids == {299}


def test_brackets_are_text_behind_a_backslash():
    words = tokenizer.gpt2(300)
    ids = parse_prompt(r"see \[8] and [2] \[x] \n", words, 40).tolist()
    text = words.decode(ids).removesuffix("[mask]" * (40 - len(ids[: -ids[::-1].index(ids[0])])))
    assert text.startswith("see [8] and [mask][mask] \\[x] \\n[mask]")


def test_a_lone_space_before_a_gap_is_noted_where_a_word_begins_with_its_space():
    words, letters = tokenizer.gpt2(300), tokenizer.chars("abc ")
    assert lone_spaces("The [8] of the[4] union [16]", words) == ["[8]", "[16]"]
    assert lone_spaces("The[8] of", words) == [] and lone_spaces("a [8] b", letters) == []
    assert lone_spaces("the [8] of", pair("first")[0]) == ["[8]"]
