"""The transformer backbone: what it computes before training, what its heads look at first, and its size."""

import dataclasses

import pytest
import torch

from cadd_min.dit import PRESETS, Block, DiT, PatchSize, Rotary, Size, TimeEmbedding, attend
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.utils.errors import InputError
from tests.toys import nano, randomized, rng

SIZE = Size(layers=2, width=128, heads=4)


@pytest.mark.parametrize("size", [SIZE, PatchSize(layers=2, width=128, heads=4, embed=8, patch=1)])
def test_starts_as_identity_at_every_time(size):
    """Check adaLN-Zero: the untrained backbone is one LayerNorm at every t."""
    x = torch.randn(3, 10, 128, generator=rng(0))
    y = DiT(size, 10)(x, torch.tensor([0.0, 0.4, 1.0]))
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (128,)))


def test_with_open_gates_a_backbone_starts_as_a_transformer_without_time():
    """Check the formula of a block whose gates are 1: its attention and its MLP are added, at every t."""
    x, norm = torch.randn(3, 10, 128, generator=rng(0)), lambda x: torch.nn.functional.layer_norm(x, (128,))
    net, h = DiT(dataclasses.replace(SIZE, gate=1.0), 10), x
    for block in net.blocks:
        q, k, v = block.qkv(norm(h)).unflatten(-1, (3, 4, 32)).permute(2, 0, 3, 1, 4)
        h = h + block.out(attend(net.rotary(q), net.rotary(k), v).transpose(1, 2).flatten(2))
        h = h + block.mlp(norm(h))
    torch.testing.assert_close(net(x, torch.tensor([0.0, 0.4, 1.0])), norm(h))
    assert (h - x).norm() > 0.3 * x.norm()


def test_a_cpu_attends_in_float32():
    """Check attention in bfloat16 bit for bit: computed in float32, then rounded. bfloat16 throughout differs."""
    q, k, v = torch.randn(3, 2, 4, 50, 32, generator=rng(0)).bfloat16()
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float()).bfloat16()
    assert torch.equal(attend(q, k, v), expected)
    assert not torch.equal(torch.nn.functional.scaled_dot_product_attention(q, k, v), expected)


def test_rotary_sees_distances_only():
    """Check that q.k is the same at all pairs of positions of one distance, and depends on the distance's sign."""
    rotary, (q, k) = Rotary(32, 20), torch.randn(2, 32, generator=rng(0))
    dots = rotary(q.expand(20, 32)) @ rotary(k.expand(20, 32)).T
    for distance in (-7, 0, 3):
        torch.testing.assert_close(*torch.broadcast_tensors(dots.diagonal(distance), dots.diagonal(distance)[0]))
    assert dots.diagonal(1)[0] != pytest.approx(float(dots.diagonal(-1)[0]))


def test_a_time_has_no_classes_and_no_table_in_the_checkpoint():
    assert TimeEmbedding(8).state_dict().keys() == {f"mlp.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")}


def first_attention(block: Block, rotary: Rotary, length: int) -> torch.Tensor:
    """Compute each head's attention (heads, L, L) from the biases alone: that of an input of zeros."""
    q, k, _ = block.qkv.bias.detach().view(3, block.heads, 1, -1).expand(-1, -1, length, -1)
    return (rotary(q) @ rotary(k).transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("size", [SIZE, PRESETS["nano"], PRESETS["small"]])
def test_heads_start_by_looking_at_neighbours(size):
    """Check that heads 0, 1, 2, 3, ... attend most to offsets -1, 1, -2, 2, ...

    Power: without the biases every head's attention is flat.
    """
    net = DiT(size, 64)
    for block in net.blocks:
        attention = first_attention(block, net.rotary, 64)
        for head in range(size.heads):
            offset = (head // 2 + 1) * (1 if head % 2 else -1)
            rows = torch.arange(10, 50)
            assert torch.equal(attention[head, rows].argmax(-1), rows + offset)
            assert attention[head, rows, rows + offset].min() > 0.1
            away = torch.arange(64)[:, None] + offset - torch.arange(64)
            bands = net.rotary.frequency[:8]  # the logit is 6 at its maximum
            logits = 6 * torch.cos(away[..., None] * bands).mean(-1)
            torch.testing.assert_close(attention[head], logits.softmax(-1), rtol=1e-3, atol=1e-5)
        torch.nn.init.zeros_(block.qkv.bias)
        torch.testing.assert_close(first_attention(block, net.rotary, 64), torch.full((size.heads, 64, 64), 1 / 64))


def test_small_is_the_papers_size():
    """Check the number of parameters, 1% above the paper's 168M, and adaLN-Zero: what is faster at tiny stays there."""
    with torch.device("meta"):
        net = Denoiser(ModelConfig(50257, 1024, PRESETS["small"], latent_norm=1.0))
    assert sum(p.numel() for p in net.parameters()) == 169_584_640
    assert PRESETS["small"].gate == 0


def test_a_backbone_of_text_sees_both_sides_and_no_absolute_positions():
    net = SIZE.build((8,))
    assert net.position is None and not any(block.causal for block in net.blocks)


def test_heads_must_divide_the_width():
    with pytest.raises(InputError, match="twice the heads"):
        DiT(Size(layers=1, width=100, heads=3), 8)


def test_absolute_positions_tell_masks_apart():
    """Check that a network of lines can name another token at each position while all inputs are masks.

    Power: without absolute positions the logits are equal at all positions, whatever the weights are.
    """
    x_t, z_t, t = torch.full((2, 12), 11), torch.zeros(2, 12, 0), torch.full((2,), 0.7)
    lines, text = (randomized(nano("mdlm", rows=rows), 0.3)(x_t, z_t, t) for rows in (True, False))
    torch.testing.assert_close(text, text[:, :1].expand_as(text))
    assert torch.pdist(lines[0]).min() > 0.1  # each position differs from every other
    torch.testing.assert_close(lines[0], lines[1])
    new, old = nano("mdlm", rows=True), nano("mdlm")
    assert new.state_dict().keys() - old.state_dict().keys() == {"backbone.position"}
    assert old.state_dict().keys() < new.state_dict().keys() and not new.backbone.position.any()


def test_a_causal_network_of_lines_takes_the_first_positions():
    """Check that the logits at a position do not depend on how many positions follow."""
    net = randomized(nano("ar", rows=True), 0.3)
    x, t = torch.randint(11, (2, 12), generator=rng(0)), torch.zeros(2)
    whole = net(x, torch.zeros(2, 12, 0), t)
    torch.testing.assert_close(net(x[:, :5], torch.zeros(2, 5, 0), t), whole[:, :5])
