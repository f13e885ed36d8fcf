"""The public MDLM's weights: the converted model computes the same log probabilities, in both directions."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from cadd_min.checkpoints import mdlm
from cadd_min.checkpoints.load import from_pretrained
from cadd_min.checkpoints.mdlm import from_mdlm, to_mdlm
from cadd_min.objective import Batch, Objective, training_loss
from cadd_min.utils.errors import InputError
from tests.toys import nano, rng, save_untrained

WIDTH, HEADS, LAYERS, COND, VOCAB, LENGTH = 16, 2, 2, 8, 11, 12


class Norm(nn.Module):
    """LayerNorm with weights, without a bias."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:]) * self.weight


class Block(nn.Module):
    """MDLM's block. Complex numbers rotate the pairs (i, i + head_dim / 2) of queries and keys."""

    def __init__(self, width, cond):
        super().__init__()
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(cond, 6 * width)

    def forward(self, x, c, rotation):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        q, k, v = self.attn_qkv(self.norm1(x) * (1 + scale_a) + shift_a).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, L, head_dim)
        q, k = (torch.complex(*y.chunk(2, -1)) * rotation for y in (q, k))  # (B, heads, L, head_dim / 2)
        weights = ((q @ k.mH).real / math.sqrt(v.shape[-1])).softmax(-1)
        x = x + gate_a * self.attn_out((weights @ v).transpose(1, 2).flatten(2))
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class PublicDiT(nn.Module):
    """The released network after its description: tokens (B, L) and sigma (B,) to logits (B, L, V + 1)."""

    def __init__(self):
        super().__init__()
        self.vocab_embed = nn.ParameterDict({"embedding": torch.zeros(VOCAB + 1, WIDTH)})
        self.sigma_map = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, COND), nn.SiLU(), nn.Linear(COND, COND))})
        self.rotary_emb = nn.Module()
        self.rotary_emb.register_buffer("inv_freq", 10000 ** -(torch.arange(0, 8, 2) / 8))
        self.blocks = nn.ModuleList([Block(WIDTH, COND) for _ in range(LAYERS)])
        self.output_layer = nn.ModuleDict({
            "norm_final": Norm(WIDTH), "linear": nn.Linear(WIDTH, VOCAB + 1),
            "adaLN_modulation": nn.Linear(COND, 2 * WIDTH),
        })  # fmt: skip

    def forward(self, x, sigma):
        angle = sigma[:, None] * 10000 ** -(torch.arange(128) / 128)
        c = F.silu(self.sigma_map["mlp"](torch.cat([angle.cos(), angle.sin()], -1)))
        angle = torch.arange(x.shape[1])[:, None] * self.rotary_emb.inv_freq
        h = self.vocab_embed["embedding"][x]
        for block in self.blocks:
            h = block(h, c, torch.polar(torch.ones_like(angle), angle))
        shift, scale = self.output_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        return self.output_layer["linear"](self.output_layer["norm_final"](h) * (1 + scale) + shift)


def randomised(net: nn.Module, seed: int, std: float = 0.4) -> nn.Module:
    """Move every parameter at random, as training would, so that no norm is 1 and no bias 0."""
    for parameter in net.parameters():
        parameter.data += std * torch.randn(parameter.shape, generator=rng(seed + parameter.numel()))
    return net.eval()


def public_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Make random weights under the names of the released file."""
    torch.manual_seed(seed)
    return {f"backbone.{name}": value for name, value in randomised(PublicDiT(), seed).state_dict().items()}


def public_log_probabilities(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Compute log p (B, L, V) as MDLM does: sigma is 0, and the mask has probability zero."""
    net = PublicDiT()
    net.load_state_dict({name.removeprefix("backbone."): value for name, value in state.items()})
    return net(x, torch.zeros(len(x)))[..., :-1].log_softmax(-1)


def log_probabilities(model, x: torch.Tensor, t: float) -> torch.Tensor:
    """Compute log p (B, L, V) of this project's model at time t."""
    return model(x, torch.zeros(*x.shape, 0), torch.full((len(x),), t)).log_softmax(-1)


def some_tokens(vocab_size: int = VOCAB) -> torch.Tensor:
    """Draw tokens (3, LENGTH) from 0 to vocab_size, which is the mask's id where it is VOCAB."""
    return torch.randint(vocab_size + 1, (3, LENGTH), generator=rng(1))


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["backbone.", "", "module.", "_orig_mod.backbone.", "model.module."])
def test_theirs_here_gives_the_same_log_probabilities_at_every_position_and_time(prefix):
    """Compare the converted model with the public network at three times, with the prefix "backbone." and without.

    A wrong fold of a norm, a wrong scale of the embedding, or a time that is not constant would show.
    """
    state, x = public_state(), some_tokens()
    expected = public_log_probabilities(state, x)
    assert expected.std() > 0.5  # far from uniform
    model = from_mdlm({prefix + name.removeprefix("backbone."): v for name, v in state.items()}, LENGTH)
    for t in (0.0, 0.3, 1.0):
        assert torch.allclose(log_probabilities(model, x, t), expected, atol=2e-4)


def test_the_bias_of_the_head_reaches_the_loss_and_its_gradient():
    """Compare the gradient of the head's bias with a finite difference of the training loss."""
    model, x, config = from_mdlm(public_state(), LENGTH), some_tokens(VOCAB - 1), Objective(wrong_hints=0.0)
    loss = lambda: training_loss(model, Batch(x), torch.linspace(0.1, 0.9, len(x)), config, rng(2)).total
    loss().backward()
    direction = torch.randn(VOCAB, generator=rng(3))
    model.head.bias.data += 0.01 * direction
    loss_after = loss().item()
    model.head.bias.data -= 0.02 * direction
    slope = float(model.head.bias.grad @ direction)
    assert abs(slope) > 0.1 and (loss_after - loss().item()) / 0.02 == pytest.approx(slope, rel=0.01)


@torch.no_grad()
def test_there_and_back_again():
    """Compare names, shapes and log probabilities after both conversions, and the tensors after a third."""
    state, x = public_state(), some_tokens()
    back = to_mdlm(from_mdlm(state, LENGTH))
    assert {n: v.shape for n, v in back.items()} == {n: v.shape for n, v in state.items()}
    assert torch.allclose(public_log_probabilities(back, x), public_log_probabilities(state, x), atol=2e-4)
    again = from_mdlm(back, LENGTH).state_dict()
    for name, value in from_mdlm(state, LENGTH).state_dict().items():
        assert torch.allclose(again[name], value, atol=1e-5), name


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_ours_there_is_what_it_is_at_the_time_that_was_chosen(bias, monkeypatch):
    """Compare MDLM's form of a model at t = 0.2 with the model at that time, and with the form converted back.

    The model sees the time, and its queries, keys and values have biases: MDLM has neither. The conversion must not
    change the model's own tensors.
    """
    monkeypatch.setattr("tests.toys.NANO", mdlm.Size(LAYERS, WIDTH, HEADS, COND))
    model, x = randomised(nano("mdlm", VOCAB, LENGTH, head_bias=bias), 5, 0.3), some_tokens()
    early, late = (log_probabilities(model, x, t) for t in (0.2, 0.9))
    assert (early - late).abs().max() > 0.1
    state = to_mdlm(model, 0.2)
    assert torch.allclose(public_log_probabilities(state, x), early, atol=2e-4)
    assert torch.allclose(log_probabilities(from_mdlm(state, LENGTH), x, 0.9), early, atol=2e-4)
    model.double()  # in the conversion's own dtype a conversion without a copy would change the model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    to_mdlm(model, 0.2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_has_no_form_of_theirs_is_refused():
    """Check that a model that sees the time needs a t in [0, 1], and that CADD and models with classes are refused."""
    for t in (None, 1.5, math.nan):
        with pytest.raises(InputError, match="--time must say at which t from 0 to 1"):
            to_mdlm(nano("mdlm"), t)
    with pytest.raises(InputError, match="this is cadd"):
        to_mdlm(nano("cadd"), 0.5)
    with pytest.raises(InputError, match="no classes"):
        to_mdlm(nano("mdlm", classes=3), 0.5)


def test_a_missing_left_over_or_misshapen_tensor_is_named():
    """Check that the error names the first tensor that does not fit."""
    for change, message in (
        ({"backbone.blocks.1.norm2.weight": None}, "blocks.1.norm2.weight is missing"),
        ({"backbone.rotary_emb.inv_freq": None}, "rotary_emb.inv_freq is missing"),
        ({"backbone.blocks.0.attn_qkv.bias": torch.zeros(48)}, "blocks.0.attn_qkv.bias has no place"),
        ({"backbone.blocks.4.norm1.weight": torch.ones(16)}, "blocks.2.norm1.weight is missing"),
        ({"step": torch.ones(1)}, "step has no place"),
        ({"backbone.output_layer.linear.weight": torch.zeros(11, 16)}, r"the shape \(11, 16\), expected \(12, 16\)"),
        ({"backbone.rotary_emb.inv_freq": torch.ones(4)}, "other frequencies"),
    ):  # fmt: skip
        state = public_state() | change
        with pytest.raises(InputError, match=message):
            from_mdlm({name: value for name, value in state.items() if value is not None}, LENGTH)


def test_files_of_tensors_are_read_and_nothing_in_them_is_run(tmp_path):
    """Check each kind of file, and that a pickle that would run code is refused without running it."""
    state = public_state()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "weights.bin")
    torch.save({"state_dict": state, "step": 3}, tmp_path / "lightning.ckpt")
    for source in (tmp_path, *tmp_path.iterdir()):
        tensors = mdlm.read(source)
        assert tensors.keys() == state.keys() and all(torch.equal(tensors[name], state[name]) for name in state)

    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"state_dict": state, "config": Evil()}, tmp_path / "evil.ckpt")
    for name in ("evil.ckpt", "none.ckpt"):
        with pytest.raises(InputError, match=rf"{name} is no file of tensors alone"):
            mdlm.read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_on_the_command_line_there_and_back(call, tmp_path, monkeypatch):
    """Check both conversions by export.py, for a tiny network with GPT-2's vocabulary, and that no file is replaced."""
    monkeypatch.setattr("tests.checkpoints.test_mdlm.VOCAB", 50257)
    save_file(public_state(), tmp_path / "theirs.safetensors")
    code, out, err = call("export.py from-mdlm theirs.safetensors ours --length 12")
    assert code == 0 and "written: ours" in out, err
    model, words = from_pretrained(tmp_path / "ours")
    assert words.decode(words.encode("Hello there")) == "Hello there" and model.config.length == 12
    code, out, err = call("sample.py --ckpt ours --steps 2")
    assert code == 0 and "model mdlm at step unknown" in out, err
    assert call("export.py to-mdlm ours back.safetensors")[0] == 0
    assert load_file(tmp_path / "back.safetensors").keys() == public_state().keys()
    code, _, err = call("export.py to-mdlm ours back.safetensors")
    assert code == 2 and "back.safetensors exists" in err


def test_other_vocabularies_have_no_tokenizer_here(call, tmp_path):
    """Check that weights with another vocabulary than GPT-2's are refused and leave no folder, and so is CADD."""
    save_file(public_state(), tmp_path / "small.safetensors")
    code, _, err = call("export.py from-mdlm small.safetensors ours")
    assert code == 2 and "has 11 tokens, expected GPT-2's 50257" in err and not (tmp_path / "ours").exists()
    save_untrained(tmp_path / "cadd.pt", nano("cadd").config, {"kind": "chars", "alphabet": "abcdefghij"})
    code, _, err = call("export.py to-mdlm cadd.pt x.safetensors")
    assert code == 2 and "this is cadd" in err
