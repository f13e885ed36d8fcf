"""An existing model as the denoiser: without its latent it is unchanged, and only masked positions see the latent."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from cadd_min.baselines.dispatch import draw
from cadd_min.checkpoints import file as checkpoint
from cadd_min.checkpoints.load import load_denoiser
from cadd_min.data.hf_tokenizer import HFTokenizer
from cadd_min.objective import Batch, Objective, training_loss
from cadd_min.orders import Sampling
from cadd_min.upgrade import families
from cadd_min.upgrade.families import open_source
from cadd_min.upgrade.folder import open_upgraded, save
from cadd_min.upgrade.wrapper import Upgraded, kept, source_of, upgrade
from cadd_min.utils.errors import InputError
from tests.toys import ROOT, TINY, rng

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "<s>", "</s>", "[MASK]", *"abcdefghijklmnopqrstuvwxyz ", "the", "of", "and"]
V, L = 40, 12  # V: rows of the embedding, more than there are words
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": V}
MASK = 3


def words(mask: bool = True) -> Any:
    """Make a tokenizer of letters, with a mask token or without."""
    vocab = [word for word in WORDS if mask or word != "[MASK]"]
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<pad>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    special = {"mask_token": "[MASK]"} if mask else {}
    template = (
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="</s>", bos_token="<s>", pad_token="<pad>", chat_template=template, **special
    )


def llama(**settings: Any) -> Any:
    """Make a tiny random Llama."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=64, **settings)
    )


def write_llada(folder: Path) -> Any:
    """Write a Llama under LLaDA's names."""
    from safetensors.torch import save_file

    model = llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-5)
    names = {
        "model.embed_tokens": "model.transformer.wte",
        "model.norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
        "model.layers.": "model.transformer.blocks.",
        "self_attn.o_proj": "attn_out",
        "self_attn.": "",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
        "mlp.gate_proj": "ff_proj",
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
    }
    state = {}
    for name, value in model.state_dict().items():
        for llama_name, llada_name in names.items():
            name = name.replace(llama_name, llada_name)
        state[name] = value.contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 1,
        "mlp_hidden_size": 24,
        "vocab_size": V,
        "embedding_size": V,
        "max_sequence_length": 64,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-5,
        "block_type": "llama",
        "activation_type": "silu",
        "weight_tying": False,
        "mask_token_id": MASK,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


def write_dream(folder: Path) -> Any:
    """Write a Qwen2 whose config.json says that it is Dream."""
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SMALL, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False)
    )
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": MASK}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def write_bert(folder: Path) -> Any:
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=64))
    torch.nn.init.normal_(model.cls.predictions.decoder.bias)
    model.save_pretrained(folder)
    return model


def write_modernbert(folder: Path) -> Any:
    config = transformers.ModernBertConfig(**SMALL, max_position_embeddings=64, pad_token_id=0)
    model = transformers.ModernBertForMaskedLM(config)
    model.save_pretrained(folder)
    return model


def write_llama(folder: Path) -> Any:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(folder)
    return model


def write_gpt2(folder: Path) -> Any:
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=V, n_positions=64)
    )
    model.save_pretrained(folder)
    return model


FAMILIES = {  # the function that writes the model, and whether its logits stand one position before their token
    "llada": (write_llada, False),
    "dream": (write_dream, True),
    "bert": (write_bert, False),
    "modernbert": (write_modernbert, False),
    "llama": (write_llama, True),
    "gpt2": (write_gpt2, True),
}


def write(name: str, folder: Path, mask: bool = True) -> Any:
    """Write the folder of a tiny random model as its authors would publish it. Returns the model without dropout."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = FAMILIES[name][0](folder)
    words(mask).save_pretrained(folder)
    return model.eval()


def original(name: str, model: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute the logits of the library's own model at the positions of their tokens, with attention to both sides."""
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    model.config.is_causal = False
    logits = model(input_ids=x).logits
    return torch.cat([logits[:, :1], logits[:, :-1]], 1) if FAMILIES[name][1] else logits


def noisy(model: Upgraded, seed: int = 0, length: int = L) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make (x_t, z_t, t) with every third position masked."""
    x = torch.randint(4, 30, (2, length), generator=rng(seed))
    x[:, ::3] = model.mask_id
    return x, torch.randn(2, length, model.latent.dim, generator=rng(seed + 1)), torch.tensor([0.3, 0.8])


@pytest.mark.parametrize("name", FAMILIES)
def test_with_its_latent_off_it_is_the_original_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Compare the logits at z_t = 0, and those of a masked model, with the library's own model, bit for bit.

    Power: with z_t on, the logits change.
    """
    library = write(name, tmp_path / "m")
    for kind in ("mdlm", "cadd"):
        model = upgrade(open_source(str(tmp_path / "m")), L, model=kind).eval()
        assert model.mask_id == MASK and model.config.shift is FAMILIES[name][1]
        x, z, t = noisy(model)
        expected, tokens = original(name, library, x), V - model.config.unused
        assert torch.equal(model(x, 0 * z, t)[..., :tokens], expected[..., :tokens])
        assert (model(x, z, t)[..., tokens:] == -torch.inf).all() and tokens >= len(WORDS)
        rows = torch.tensor([0, 5, 13])
        at = model.logits_at(x, 0 * z, t, rows)
        torch.testing.assert_close(at[:, :tokens], expected.flatten(0, 1)[rows, :tokens])
        torch.testing.assert_close(model.features(x, 0 * z, t) @ model.head_matrix().T, expected)
        if model.latent.dim:
            assert not torch.equal(model(x, z, t)[..., :tokens], expected[..., :tokens])


def test_a_row_that_is_no_token_is_never_drawn(tmp_path: Path) -> None:
    """Make the rows without a token the likeliest of all. Power: with `unused` 0 they are drawn."""
    write("bert", tmp_path / "m")
    model = upgrade(open_source(str(tmp_path / "m")), L).eval()
    model.head.bias.data[len(WORDS) :] += 50
    assert int(draw(model, 4, Sampling(8), generator=rng(0)).max()) < len(WORDS)
    model.config = dataclasses.replace(model.config, unused=0)
    assert int(draw(model, 4, Sampling(8), generator=rng(0)).min()) >= len(WORDS)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_new_mask_is_trained_with_lora_too(lora: int, tmp_path: Path, call: Any) -> None:
    """Compare the mask's embedding before and after tuning, in the run and in its folder. Only LoRA's matrices move."""
    write("llama", tmp_path / "m", mask=False)
    (tmp_path / "a.txt").write_text("the dog and the cat of the hill " * 400)
    run = f"finetune.py --from {tmp_path / 'm'} --mask-token <mask> --dataset {tmp_path / 'a.txt'} {TUNE}"
    code, _, err = call(f"{run} --lora {lora} --lr 1e-2 --cache {tmp_path} --out {tmp_path / 'run'}")
    assert code == 0, err
    before = open_source(str(tmp_path / "m"), "<mask>")
    rows, mask = before.network.get_input_embeddings().weight, before.tokenizer.mask_id
    tuned, _, _ = load_denoiser(tmp_path / "run")
    assert (tuned.mask_shift is not None) == bool(lora) == tuned.config.mask_shift
    call(f"export.py folder {tmp_path / 'run'} {tmp_path / 'folder'}")
    opened, _ = open_upgraded(str(tmp_path / "folder"))
    moved = (opened.embedding.weight - rows).norm(dim=-1)
    assert moved[mask] > 0.01 and (moved[:mask].max() == 0) == bool(lora)
    x, z, t = noisy(opened)
    one, two = (model.eval()(x, z, t)[..., :mask] for model in (opened, tuned))  # the mask's own logit is never read
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_windows_and_anneal_do_not_go_together(tmp_path: Path) -> None:
    config = transformers.MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=4)
    (tmp_path / "m").mkdir()
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "m")
    words().save_pretrained(tmp_path / "m")
    source = open_source(str(tmp_path / "m"))
    with pytest.raises(InputError, match=r"anneal would open the windows of 4 tokens"):
        upgrade(source, L, anneal=3)
    assert upgrade(source, 4, anneal=3).config.anneal == 3


def test_a_chat_template_that_loops_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """jinja2 limits a range, and not a range in a range."""
    monkeypatch.setattr("cadd_min.data.hf_tokenizer.TEMPLATE_SECONDS", 0.5)
    write("bert", tmp_path / "m")
    tokenizer = open_source(str(tmp_path / "m")).tokenizer
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match=r"chat template fails: it takes longer than 0.5 seconds"):
        tokenizer.encode_chat("a")


@pytest.mark.parametrize("name", FAMILIES)
def test_only_masked_positions_see_the_latent_and_all_places_see_both_sides(name: str, tmp_path: Path) -> None:
    """Check that z_t changes the network's input at masked positions only, and the last token changes the first logits.

    The second fails where a layer of the library stays causal.
    """
    write(name, tmp_path / "m")
    model = upgrade(open_source(str(tmp_path / "m")), L).eval()
    x, z, t = noisy(model)
    inputs: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(x, z, t)
    e, masked = model.embedding(x), x == model.mask_id
    assert torch.equal(inputs[0][~masked], e[~masked]) and not torch.equal(inputs[0][masked], e[masked])
    changed = x.clone()
    changed[:, -1] = 5
    first = 1 if model.config.shift else 0  # the first position of a shifted model has the second's logits
    assert not torch.equal(model(x, z, t)[:, first], model(changed, z, t)[:, first])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_looks_at_all_places_also_in_training(name: str, tmp_path: Path) -> None:
    """Check by gradients that each place of a layer's output depends on each place of its input.

    A model in which one layer alone is open looks open as a whole. New versions of the library ask the configuration,
    older versions ask the layer.
    """
    write(name, tmp_path / "m")
    model, passed = upgrade(open_source(str(tmp_path / "m")), L).train(), []
    assert not any(getattr(module, "is_causal", False) for module in model.backbone.modules())
    for layer in model.blocks():
        layer.register_forward_hook(lambda _, x, named, y: passed.append((x, named, y)), with_kwargs=True)
    model.at_step(0)
    model(*noisy(model))
    assert len(passed) == len(model.blocks()) > 1
    for positional, named, y in passed:
        x, y = positional[0] if positional else named["hidden_states"], y if isinstance(y, torch.Tensor) else y[0]
        weight = torch.randn(y.shape[-1], generator=rng(0))
        for place in range(L):
            (gradient,) = torch.autograd.grad(y[:, place] @ weight, x, torch.ones(len(y)), retain_graph=True)
            assert (gradient.abs().sum(-1) > 0).all()


def test_the_mask_has_no_probability_in_the_training_loss(tmp_path: Path) -> None:
    """Check that the CE and the squared error stay the same when the mask, a token of the head, gets a huge logit."""
    write("bert", tmp_path / "m")
    model, losses = upgrade(open_source(str(tmp_path / "m")), L), []
    batch, u = Batch(torch.randint(4, 30, (3, L), generator=rng(0))), torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    for bias in (0.0, 50.0):
        with torch.no_grad():
            model.head.bias[model.mask_id] = bias
        losses.append(training_loss(model, batch, u, Objective(mse=1.0), rng(1)))
    assert model.mask_id < len(model.head_matrix()) and losses[0].masked > 0
    torch.testing.assert_close(losses[1], losses[0])


def test_a_sure_hint_looks_like_the_embedding_of_its_token(tmp_path: Path) -> None:
    """Check at t = 0 that the hint has the direction of the token's embedding, and the length of a usual embedding.

    The length of the latent itself carries the share `evidence` of log V at t = 1/2, as in latent.py. It is far from 1.
    """
    write("bert", tmp_path / "m")
    model = upgrade(open_source(str(tmp_path / "m")), L, evidence=1.0)
    x_0, t = torch.randint(4, 30, (1, L), generator=rng(0)), torch.zeros(1)
    z, e = model.table()[x_0], model.embedding(x_0)
    masked = torch.full_like(x_0, model.mask_id)
    added = model.latent.fuse(0 * e, z, masked == model.mask_id, t)
    assert torch.cosine_similarity(added, e, -1).min() > 0.999
    usual = model.embedding.weight.norm(dim=-1).median()
    torch.testing.assert_close(added.norm(dim=-1), usual.expand(1, L), rtol=1e-4, atol=0)
    dim, snr = z.shape[-1], float(model.schedule.snr(torch.tensor(0.5)))
    assert dim / 2 * math.log1p(model.latent.norm**2 * snr / dim) == pytest.approx(math.log(V), rel=1e-6)
    assert model.latent.norm > 3


@pytest.mark.parametrize(
    "options, trained",
    [
        ({}, lambda name: True),
        ({"freeze_embedding": True}, lambda name: "word_embeddings" not in name and name != "head.weight"),
        ({"lora": 2}, lambda name: "lora_" in name),
    ],
    ids=["full", "frozen embedding", "lora"],
)
def test_gradients_reach_what_is_to_be_trained_and_nothing_else(options: Any, trained: Any, tmp_path: Path) -> None:
    """Compare the names of parameters that get a gradient with those that are to be trained."""
    write("bert", tmp_path / "m")
    model = upgrade(open_source(str(tmp_path / "m")), L, **options).train()
    for parameter in model.parameters():
        if parameter.requires_grad:  # LoRA's second matrices start at 0, which makes the first ones' gradients 0
            torch.nn.init.normal_(parameter, std=0.1)
    model(*noisy(model)).square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    unused = {"bert.pooler", "token_type", "decoder"}
    expected = {name for name, p in model.named_parameters() if trained(name) and not any(u in name for u in unused)}
    assert with_gradient - {n for n in with_gradient if "token_type" in n} == expected


@pytest.mark.parametrize("options", [{}, {"lora": 2}, {"model": "mdlm"}], ids=["full", "lora", "mdlm"])
@pytest.mark.parametrize("name", ["llada", "bert", "llama"])
def test_saved_and_loaded_it_is_the_same(name: str, options: Any, tmp_path: Path) -> None:
    """Compare logits before saving with those of the checkpoint (bit for bit) and of the folder (up to rounding)."""
    write(name, tmp_path / "m")
    source = open_source(str(tmp_path / "m"))
    model = upgrade(source, L, evidence=0.2, **options).eval()
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):  # as if trained: LoRA starts without effect
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng(n)))
    x, z, t = noisy(model)
    expected = model(x, z, t)
    state = {"ema": model.state_dict(), "step": 3}
    content = {
        "model_config": checkpoint.model_dict(model.config),
        "tokenizer": source.tokenizer.spec(),
        "settings": {},
        "trainer": state,
    }
    checkpoint.save(tmp_path / "run" / "checkpoint.pt", content)
    loaded, tokenizer, _ = load_denoiser(tmp_path / "run")
    assert torch.equal(loaded(x, z, t), expected) and tokenizer.spec() == source.tokenizer.spec()
    save(model, source.tokenizer, tmp_path / "folder")
    opened, tokenizer = open_upgraded(str(tmp_path / "folder"))
    torch.testing.assert_close(opened.eval()(x, z, t), expected, atol=1e-5, rtol=1e-4)  # merging LoRA rounds
    assert (tokenizer.mask_id, tokenizer.eot_id, opened.config.length) == (MASK, 2, L)
    assert opened.config.evidence == 0.2 and opened.config.lora == 0


def test_the_library_opens_an_upgraded_folder_too(tmp_path: Path) -> None:
    """Compare the library's logits from the folder with those of the upgraded model at z_t = 0."""
    write("bert", tmp_path / "m")
    source = open_source(str(tmp_path / "m"))
    model = upgrade(source, L)
    x, z, t = noisy(model)
    expected = model(x, 0 * z, t)
    save(model, source.tokenizer, tmp_path / "folder")
    library = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "folder").eval()
    tokens = len(WORDS)
    torch.testing.assert_close(library(x).logits[..., :tokens], expected[..., :tokens])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "folder").mask_token_id == MASK


def test_attention_opens_by_and_by(tmp_path: Path) -> None:
    """Count at how many positions the last token changes the logits while attention is opened in ten steps.

    The count grows from at most one position to all.
    """
    write("llama", tmp_path / "m")
    model = upgrade(open_source(str(tmp_path / "m")), L, anneal=10).eval()
    x, z, t = noisy(model)
    changed = x.clone()
    changed[:, -1] = 7

    def count_affected() -> int:
        affected = (model(x, z, t) != model(changed, z, t)).any(-1)[0]  # (L,)
        return int(affected[1:].sum()) + (1 if model.config.shift else int(affected[0]))

    counts = []
    for step in (0, 3, 9, 10):
        model.at_step(step)
        counts.append(count_affected())
    assert counts[0] <= 1 and counts == sorted(counts) and counts[-1] >= L - 1 and counts[1] < L // 2 + 3


def test_a_mask_token_that_a_model_lacks_is_added(tmp_path: Path) -> None:
    """Check a new mask's id, embedding (the mean of all) and text, and that unsuitable mask tokens are refused."""
    write("llama", tmp_path / "m", mask=False)
    with pytest.raises(InputError, match="no mask token: name one with --mask-token"):
        open_source(str(tmp_path / "m"))
    source = open_source(str(tmp_path / "m"), "<mask>")
    count = len(WORDS) - 1
    weight = source.network.get_input_embeddings().weight
    assert source.tokenizer.mask_id == count and len(weight) == V  # the new mask takes a spare row
    torch.testing.assert_close(weight[count], weight[:count].mean(0))
    assert source.tokenizer.decode([4, count, 5]) == source.tokenizer.decode([4]) + "[mask]" + source.tokenizer.decode(
        [5]
    )
    for name, message in (
        ("a", "is an ordinary token"),
        ("</s>", "cannot be the token that ends"),
        ("", "must be a text"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(str(tmp_path / "m"), name)
    assert open_source(str(tmp_path / "m"), "<s>").tokenizer.mask_id == 1  # a special token of the tokenizer


def test_special_tokens_in_a_text_are_ordinary_characters(tmp_path: Path) -> None:
    """Check that the text of a special token does not become that token, but in a chat template does."""
    write("bert", tmp_path / "m")
    tokenizer = open_source(str(tmp_path / "m")).tokenizer
    assert MASK not in tokenizer.encode("a[MASK]b") and 2 not in tokenizer.encode("a</s>b")
    a, b = WORDS.index("a"), WORDS.index("b")
    assert tokenizer.encode_chat("ab") == [1, a, b, 2, 1]
    assert tokenizer.encode("ab") == [a, b]
    assert (
        MASK not in tokenizer.encode_chat("a[MASK]") and tokenizer.encode_chat("</s>").count(2) == 1
    )  # the template's
    assert tokenizer.encode("a\ud800b")[::2] == [a, b]  # half a character becomes a question mark
    for template in ("{{ raise_exception('no') }}", "{% for %}", "{{ messages[0].content.a.b }}"):
        bad = HFTokenizer(tokenizer.json, V, MASK, 2, template, tokenizer.special)
        with pytest.raises(InputError, match="chat template fails"):
            bad.encode_chat("ab")


def damage(folder: Path, **values: Any) -> None:
    """Change values in a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("[]"), "no config.json, or a damaged one"),
        (lambda f: damage(f, model_type="vit"), "'vit' is no language model"),
        (lambda f: damage(f, model_type=None), "is no language model"),
        (lambda f: (f / "model.safetensors").unlink(), "could not be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:99]), "not be loaded"),
        (lambda f: damage(f, hidden_size=32), "of another shape|could not be loaded"),
        (lambda f: damage(f, num_hidden_layers=3), "missing in its weights"),
        (lambda f: damage(f, num_hidden_layers=10**9), "num_hidden_layers must be at most 1000, not 1000000000"),
        (lambda f: damage(f, text_config={"n_layer": 1001}), "n_layer must be at most 1000"),
        (lambda f: damage(f, vocab_size=20), "of another shape|could not be loaded|do not belong together"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "could not be loaded"),
    ],
)
def test_a_folder_that_is_no_model_is_a_sentence(harm: Any, message: str, tmp_path: Path) -> None:
    """Check that a damaged folder raises an InputError of one line that says what is wrong."""
    write("bert", tmp_path / "m")
    harm(tmp_path / "m")
    with pytest.raises(InputError, match=message) as error:
        open_source(str(tmp_path / "m"))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_its_unknown_token_is_a_sentence(tmp_path: Path) -> None:
    """Check that text outside of the vocabulary raises InputError where the vocabulary lacks its unknown token."""
    write("bert", tmp_path / "m")
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[MASK]": 1}, unk_token="[UNK]"))
    bad = HFTokenizer(fast.to_str(), V, 1, 2)
    assert bad.encode("a") == [0]
    with pytest.raises(InputError, match=r"tokenizer.json cannot make tokens of a text: .*\[UNK\]"):
        bad.encode("b")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """Check that a failed save leaves no file, whether the weights or, after them, the tokenizer do not fit.

    A limit on the size of files stands for a full disk.
    """
    write("bert", tmp_path / "m")
    code = f"""
import resource, signal
from cadd_min.utils.cli import run
from cadd_min.upgrade.families import open_source
from cadd_min.upgrade.wrapper import upgrade
from cadd_min.upgrade.folder import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (3000, 1000):
    source = open_source({str(tmp_path / "m")!r})
    model = upgrade(source, {L})
    if limit == 1000:
        model.backbone.save_pretrained = lambda part: part.mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(lambda: save(model, source.tokenizer, {str(tmp_path / "folder")!r}))
    except SystemExit as stop:
        assert stop.code == 2
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: could not save")]
    assert len(errors) == 2 and all("File too large" in line and "nothing was changed" in line for line in errors), done
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_roberta_has_fewer_positions_than_it_says(tmp_path: Path) -> None:
    """Check that the rows up to RoBERTa's padding index do not count: its 20 rows are 18 positions."""
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=20, pad_token_id=1)
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path / "m")
    words().save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="length must be at most 18"):
        upgrade(open_source(str(tmp_path / "m")), 19)
    model = upgrade(open_source(str(tmp_path / "m")), 18)
    assert model(*noisy(model, length=18)).shape == (2, 18, V)


def test_gemma_multiplies_its_embeddings_and_so_does_the_hint(tmp_path: Path) -> None:
    """Check that the unit is measured after Gemma's multiplication, so that a hint is as long as an embedding."""
    config = transformers.GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8)
    transformers.GemmaForCausalLM(config).save_pretrained(tmp_path / "m")
    words().save_pretrained(tmp_path / "m")
    model = upgrade(open_source(str(tmp_path / "m")), L)
    assert model.config.unit > 3 * float(model.embedding.weight.detach().norm(dim=-1).median())
    ids = torch.arange(4, 30)[None]
    e = model.embedding(ids)
    hint = model.latent.fuse(0 * e, model.table()[ids], ids > 0, torch.zeros(1))
    assert 0.6 < (hint.norm(dim=-1).mean() / e.norm(dim=-1).mean()).item() < 1.6


@pytest.mark.parametrize("name", FAMILIES)
def test_in_training_nothing_is_random_but_the_noise(name: str, tmp_path: Path) -> None:
    """Check that two forward passes in training mode agree bit for bit: no dropout is left."""
    write(name, tmp_path / "m")
    model = upgrade(open_source(str(tmp_path / "m")), L).train()
    x, z, t = noisy(model)
    assert torch.equal(model(x, z, t), model(x, z, t))


def test_an_upgraded_folder_is_tuned_again_as_it_was(tmp_path: Path, call: Any) -> None:
    """Check that finetune.py keeps a folder's and a run's settings, and refuses to change them in a resumed run."""
    write("llada", tmp_path / "m")
    source = open_source(str(tmp_path / "m"))
    save(upgrade(source, L, continuous="flow", evidence=0.3, lora=2), source.tokenizer, tmp_path / "folder")
    (tmp_path / "a.txt").write_text("the dog and the cat of the hill " * 400)
    run = f"finetune.py --from {tmp_path / 'folder'} --dataset {tmp_path / 'a.txt'} --steps 2 --dtype float32"
    code, _, err = call(f"{run} --evidence 0.4 --cache {tmp_path} --out {tmp_path / 'run'}")
    assert code == 0, err
    config = load_denoiser(tmp_path / "run")[0].config
    assert (config.shift, config.continuous, config.evidence, config.length) == (False, "flow", 0.4, L)
    assert config.lora == 0 and config.unit == load_denoiser(tmp_path / "folder")[0].config.unit
    for option, sentence in (("--hint raw", "hint is linear"), ("--shift", "shift is False")):
        code, _, err = call(f"finetune.py --resume --out {tmp_path / 'run'} {option}")
        assert code == 2 and f"{sentence} in this run, and cannot become another" in err
    run = run.replace(str(tmp_path / "folder"), str(tmp_path / "run"))  # a run's folder in place of an upgraded folder
    code, _, err = call(f"{run} --hint raw --cache {tmp_path} --out {tmp_path / 'on'}")
    assert code == 0, err
    tuned = load_denoiser(tmp_path / "on")[0].config
    assert dataclasses.replace(tuned, base=config.base) == dataclasses.replace(config, hint="raw")


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_run_with_lora_is_tuned_again_from_where_it_was(name: str, tmp_path: Path) -> None:
    """Compare the logits of a run with LoRA with those of its next upgrade, with LoRA and without.

    Only the new LoRA matrices, or else all parameters, are to be trained. No warning of peft may appear.
    """
    write(name, tmp_path / "m")
    source = open_source(str(tmp_path / "m"))
    first = upgrade(source, L, lora=2, evidence=0.3, anneal=4 if name == "llama" else 0).eval()
    with torch.no_grad():
        for n, parameter in enumerate(first.parameters()):  # as if trained: LoRA starts without effect
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng(n)))
    x, z, t = noisy(first)
    expected = first(x, z, t)
    settings = kept(first.config)
    assert (settings["lora"], settings["anneal"], settings["evidence"]) == (2, 0, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = upgrade(
            source_of(first, source.tokenizer, "run"), L, unit=settings["unit"], evidence=0.3, lora=2
        ).eval()
    torch.testing.assert_close(second(x, z, t), expected, atol=1e-5, rtol=1e-4)
    assert all(p.requires_grad == ("lora_" in n) for n, p in second.named_parameters())
    third = upgrade(source_of(second, source.tokenizer, "run"), L, unit=settings["unit"], evidence=0.3).eval()
    torch.testing.assert_close(third(x, z, t), expected, atol=1e-5, rtol=1e-4)
    assert all(p.requires_grad and "lora_" not in n for n, p in third.named_parameters())


def test_a_tokenizer_of_another_model_is_a_sentence(tmp_path: Path) -> None:
    """Check that a tokenizer with more tokens than the embedding has rows is refused."""
    write("bert", tmp_path / "m")
    small = transformers.BertForMaskedLM(transformers.BertConfig(**{**SMALL, "vocab_size": 20}))
    small.save_pretrained(tmp_path / "m")
    for mask in (None, "<new>"):
        with pytest.raises(InputError, match="tokenizer has token 33, and the model's embedding 20 rows"):
            open_source(str(tmp_path / "m"), mask)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"length": 65}, "length must be at most 64"),
        ({"model": "cdm"}, "model must be one of cadd, mdlm"),
        ({"hint": "posterior"}, "hint must be one of"),
        ({"lora": -1}, "lora must be at least 0"),
        ({"evidence": float("inf")}, "evidence must be"),
        ({"latent_norm": 1e300}, "the latent's rows would have the length"),
        ({"discrete": "all-at-once"}, "discrete must be one of linear, power2, power4, power8, cosine"),
        ({"anneal": 3}, "looks both ways already"),
    ],
)
def test_settings_that_cannot_be_are_a_sentence(settings: Any, message: str, tmp_path: Path) -> None:
    """Check that a setting out of range raises an InputError that names the setting."""
    write("bert", tmp_path / "m")
    with pytest.raises(InputError, match=message):
        upgrade(open_source(str(tmp_path / "m")), **{"length": L, **settings})


def test_a_model_that_takes_no_embeddings_is_a_sentence(tmp_path: Path) -> None:
    """Check that a network without the argument inputs_embeds is refused."""
    write("bert", tmp_path / "m")
    source = open_source(str(tmp_path / "m"))

    class Blind(torch.nn.Module):
        config = source.network.config

        def forward(self, input_ids: torch.Tensor) -> None: ...

    with pytest.raises(InputError, match="must take inputs_embeds, and a Blind does not"):
        upgrade(families.Source("blind", Blind(), source.tokenizer, source.family), L)


def test_a_model_that_does_more_with_its_logits_is_a_sentence(tmp_path: Path) -> None:
    """Check that Gemma 2, which soft-caps its logits, is refused: the head alone would give other logits."""
    config = transformers.Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0)
    torch.manual_seed(0)
    (tmp_path / "m").mkdir()
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "m")
    words().save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="more than a linear map"):
        upgrade(open_source(str(tmp_path / "m")), L)


def test_without_the_library_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that without transformers the error says what to install."""
    find = families.importlib.util.find_spec
    monkeypatch.setattr(
        families.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    with pytest.raises(InputError, match=r"pip install 'transformers>=5.5' safetensors"):
        open_source(str(tmp_path))


TUNE = "--length 16 --batch-size 4 --steps 30 --warmup 3 --eval-every 15 --sample-every 30 --lr 3e-3 --dtype float32"


@pytest.mark.parametrize("options", ["", "--model mdlm", "--lora 2 --checkpointing", "--anneal 10 --continuous flow"])
def test_finetune_on_text_then_sample(options: str, tmp_path: Path, call: Any) -> None:
    """Check that the bound falls in training, that the run can be sampled, and that it can be resumed."""
    write("llama", tmp_path / "m", mask=False)
    (tmp_path / "a.txt").write_text("the dog and the cat of the hill " * 400)
    run = f"finetune.py --from {tmp_path / 'm'} --mask-token <mask> --dataset {tmp_path / 'a.txt'} {TUNE} {options}"
    code, _, err = call(f"{run} --cache {tmp_path} --out {tmp_path / 'run'}")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    bounds = [row["val_bound"] for row in rows if "val_bound" in row]
    assert bounds[-1] < bounds[0]
    code, out, err = call(f"sample.py --ckpt {tmp_path / 'run'} --steps 4 --prompt 'the [3] and'")
    assert code == 0 and out.startswith("the"), err
    code, _, err = call(f"finetune.py --resume --out {tmp_path / 'run'} --steps 32")
    assert code == 0 and "32/32" in err, err


def test_finetune_on_pairs_leaves_the_prompt_alone(tmp_path: Path, call: Any) -> None:
    """Check that samples begin with the prompt in its chat template, whether --from or --ckpt names the folder.

    Held-out pairs are not trained on, and a prompt longer than the sequence is refused.
    """
    write("bert", tmp_path / "m")
    lines = [json.dumps({"prompt": f"{a}{b}", "response": b + a}) for a in "abcdefgh" for b in "abcdefgh"]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    run = f"finetune.py --from {tmp_path / 'm'} --dataset {tmp_path / 'p.jsonl'} {TUNE} --chat --out {tmp_path / 'run'}"
    code, out, err = call(run)
    assert code == 0 and "60 pairs" in out, err  # four of 64 are held out
    code, _, err = call(f"export.py folder {tmp_path / 'run'} {tmp_path / 'folder'}")
    code, out, err = call(f"sample.py --from {tmp_path / 'folder'} --steps 4 --prompt ab --chat --length 10")
    assert code == 0 and out.startswith("<s>ab</s><s>"), err
    code, out, err = call(f"sample.py --ckpt {tmp_path / 'folder'} --steps 4 --prompt ab --chat")
    assert code == 0 and out.startswith("<s>ab</s><s>"), err
    code, _, err = call(f"sample.py --from {tmp_path / 'folder'} --prompt abcdefgh --chat --length 8")
    assert code == 2 and "--prompt has 11 tokens" in err


def test_a_model_of_this_project_is_upgraded_as_well(tmp_path: Path, call: Any) -> None:
    """Check that finetune.py makes CADD of a masked model of this project.

    With the masked model's weights and z_t = 0 the CADD model must give the same logits. The frozen embedding
    stays as it was, also after the run is resumed.
    """
    (tmp_path / "a.txt").write_text("the dog and the cat of the hill " * 400)
    data = f"--dataset {tmp_path / 'a.txt'} --cache {tmp_path}"
    call(f"train_text.py {data} {TINY} --model mdlm --out {tmp_path / 'mdlm'}")
    code, _, err = call(
        f"finetune.py --from {tmp_path / 'mdlm'} {data} {TUNE} --freeze-embedding --out {tmp_path / 'cadd'}"
    )
    assert code == 0, err
    old, _, _ = load_denoiser(tmp_path / "mdlm")
    new, _, _ = load_denoiser(tmp_path / "cadd")
    assert new.config.model == "cadd" and new.latent.dim == old.config.size.embed
    new.load_state_dict(old.state_dict())  # with these weights and the latent off, it must be the old model
    x = torch.randint(4, 30, (2, 16), generator=rng(0))
    x[:, ::2] = old.mask_id
    t, z = torch.tensor([0.2, 0.9]), torch.zeros(2, 16, new.latent.dim)
    assert torch.equal(new(x, z, t), old(x, z[..., :0], t))
    code, _, err = call(f"train_text.py --resume --out {tmp_path / 'cadd'}")
    assert code == 2 and "was trained by finetune.py" in err
    code, _, err = call(f"finetune.py --resume --out {tmp_path / 'cadd'} --steps 31")
    assert code == 0, err
    assert torch.equal(load_denoiser(tmp_path / "cadd")[0].embedding.weight, old.embedding.weight)
    code, _, err = call(f"finetune.py --from {tmp_path / 'mdlm'} {data} --length 8")
    assert code == 2 and "--length must be 16, the length of --from" in err
    code, _, err = call(f"finetune.py --from {tmp_path / 'mdlm'} {data} --lora 2")
    assert code == 2 and "lora is for models of the Hugging Face library" in err


def test_a_cadd_model_of_this_project_keeps_its_latent_when_it_is_tuned(
    tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a CADD model of this project keeps its settings in tuning, but for those that are asked for.

    The model comes from a run or from the hub. Options that only models of the Hugging Face library have are refused.
    """
    (tmp_path / "a.txt").write_text("the dog and the cat of the hill " * 400)
    data, run = f"--dataset {tmp_path / 'a.txt'} --cache {tmp_path}", tmp_path / "run"
    options = "--discrete cosine --continuous linear --evidence 0.35 --hint raw --fusion concat"
    assert call(f"train_text.py {data} {TINY} {options} --out {run}")[0] == 0
    old = load_denoiser(run)[0].config
    tune = f"{data} --steps 2 --batch-size 4 --dtype float32"
    for n, (option, change) in enumerate(
        [("", {}), ("--evidence 0.2 --model mdlm", {"evidence": 0.2, "model": "mdlm"})]
    ):
        code, _, err = call(f"finetune.py --from {run} {tune} {option} --out {tmp_path / str(n)}")
        assert code == 0, err
        assert load_denoiser(tmp_path / str(n))[0].config == dataclasses.replace(old, **change)
    for option, sentence in (
        ("--shift", "--shift is for models of"),
        ("--mask-token x", "--mask-token is for a model that"),
    ):
        code, _, err = call(f"finetune.py --from {run} {tune} {option}")
        assert code == 2 and sentence in err
    call(f"export.py folder {run} {tmp_path / 'hub'}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: {"owner/name": tmp_path / "hub"}[name])
    code, _, err = call(f"finetune.py --from hf:owner/name {tune} --out {tmp_path / 'again'}")
    assert code == 0, err
    assert load_denoiser(tmp_path / "again")[0].config == old
