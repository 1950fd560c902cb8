"""Dropout, feed-forward, the norm around a sub-layer and the cache of a decoder block."""

import pytest
import torch
from torch import nn

from transformer_scratch.attention import causal_mask, padding_mask
from transformer_scratch.blocks import AddAndNorm, DecoderBlock, Dropout, EncoderBlock, FeedForward, KeyValueCache


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_zeroes_a_share_p_and_keeps_the_expectation(p):
    torch.manual_seed(0)
    n = 400_000
    dropped = Dropout(p)(torch.ones(n))
    zeros = (dropped == 0).float().mean().item()
    assert zeros == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)  # four standard deviations
    # Survivors are all scaled alike, by 1 / (1 - p) up to the rounding of p to 16 bits.
    survivors = dropped[dropped != 0].unique()
    assert len(survivors) == 1 and survivors.item() == pytest.approx(1 / (1 - p), rel=2**-16 / (1 - p))
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


def test_dropout_is_independent_between_neighbours():
    """Four elements share one random number of 64 bits; their fates must not be tied."""
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(100_000, 4)) != 0).double()
    correlation = torch.corrcoef(kept.T)
    assert (correlation - torch.eye(4)).abs().max() < 0.02
    patterns = (kept @ torch.tensor([8.0, 4, 2, 1]).double()).long().bincount(minlength=16) / len(kept)
    assert (patterns - 1 / 16).abs().max() < 0.005, "all sixteen patterns are equally likely"


def test_small_tensors_get_pytorchs_dropout():
    """Fewer calls, where calls are what takes the time."""
    for size, same in ((2**13 - 1, True), (2**13, False)):
        torch.manual_seed(0)
        ours = Dropout(0.1)(torch.ones(size))
        torch.manual_seed(0)
        assert torch.equal(ours, nn.functional.dropout(torch.ones(size), 0.1)) == same


@pytest.mark.parametrize("rows", [50, 1_250])  # PyTorch's dropout and ours
def test_dropout_scales_the_gradient_by_the_same_mask(rows):
    torch.manual_seed(0)
    x = torch.randn(rows, 7, requires_grad=True)  # 350 or 8750 elements, not a multiple of 4
    y = Dropout(0.3)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    scale = gradient[gradient != 0].unique()
    assert len(scale) == 1 and scale.item() == pytest.approx(1 / 0.7, rel=1e-4)
    torch.testing.assert_close(y, x * gradient)


@pytest.mark.parametrize("size", [1_000, 10_000])
def test_dropout_is_reproducible_by_seed_and_differs_between_calls(size):
    dropout, x = Dropout(0.5), torch.ones(size)
    torch.manual_seed(1)
    first, second = dropout(x), dropout(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first) and torch.equal(dropout(x), second)
    torch.manual_seed(2)
    assert not torch.equal(dropout(x), first)


def test_dropout_off_is_the_identity_and_draws_nothing():
    x = torch.randn(10)
    state = torch.get_rng_state()
    assert Dropout(0.5).eval()(x) is x and Dropout(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [5, 5_000])
def test_dropout_keeps_type_and_shape(dtype, rows):
    x = torch.ones(3, rows, 2, dtype=dtype)
    assert Dropout(0.1)(x).dtype == dtype and Dropout(0.1)(x).shape == x.shape
    assert Dropout(0.1)(x.transpose(0, 2)).shape == (2, rows, 3), "not contiguous"


def test_feed_forward_is_equation_2():
    torch.manual_seed(0)
    network, x = FeedForward(4, 16), torch.randn(2, 3, 4)
    w1, b1, w2, b2 = network.parameters()
    expected = torch.clamp(x @ w1.T + b1, min=0) @ w2.T + b2
    torch.testing.assert_close(network(x), expected)


def test_add_and_norm_by_hand():
    """Post-norm: the sum is normalised, not the sub-layer's input."""
    x, sublayer_output = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, 3.0]])
    total = torch.tensor([1.0, 2.0, 6.0])
    expected = (total - 3) / (((total - 3) ** 2).mean() + 1e-5).sqrt()
    torch.testing.assert_close(AddAndNorm(3, dropout=0.0)(x, sublayer_output), expected[None])


def test_only_the_output_of_sublayers_is_dropped():
    """With everything dropped but the residual path, an encoder block is two norms (section 5.4)."""
    torch.manual_seed(0)
    block, x = EncoderBlock(8, 2, 32, dropout=0.5), torch.randn(2, 3, 8)
    for module in block.modules():
        if isinstance(module, Dropout):
            module.forward = torch.zeros_like
    mask = torch.ones(2, 1, 1, 3, dtype=torch.bool)
    norms = nn.functional.layer_norm(nn.functional.layer_norm(x, (8,)), (8,))
    torch.testing.assert_close(block(x, mask), norms)
    assert sum(isinstance(module, Dropout) for module in block.modules()) == 2


def test_a_decoder_block_step_by_step_equals_all_at_once():
    torch.manual_seed(0)
    block = DecoderBlock(8, 2, 32, dropout=0.0).double()
    x, memory = torch.randn(3, 6, 8).double(), torch.randn(3, 4, 8).double()
    mask = padding_mask(torch.tensor([[1, 1, 1, 1], [1, 1, 13, 13], [1, 1, 1, 13]]), pad_id=13)
    cache = KeyValueCache(block.cross_attention.keys_and_values(memory))
    steps = torch.cat([block.step(x[:, t : t + 1], cache, mask) for t in range(6)], dim=1)
    torch.testing.assert_close(steps, block(x, memory, mask))


def test_a_cache_forgets_finished_rows():
    torch.manual_seed(0)
    block = DecoderBlock(8, 2, 32, dropout=0.0).double()
    x, memory = torch.randn(3, 2, 8).double(), torch.randn(3, 4, 8).double()
    cache = KeyValueCache(block.cross_attention.keys_and_values(memory))
    block.step(x[:, :1], cache, None)
    rows = torch.tensor([True, False, True])
    cache.keep_rows(rows)
    torch.testing.assert_close(block.step(x[rows, 1:], cache, None), block(x, memory, None)[rows, 1:])


def test_the_decoder_block_is_causal_and_the_encoder_block_is_not():
    torch.manual_seed(0)
    x = torch.randn(1, 5, 8)
    later = x.clone()
    later[:, 3:] += 1
    memory = torch.randn(1, 4, 8)
    decoder = DecoderBlock(8, 2, 32, dropout=0.0)
    torch.testing.assert_close(decoder(x, memory, None)[:, :3], decoder(later, memory, None)[:, :3])
    encoder = EncoderBlock(8, 2, 32, dropout=0.0)
    full, causal = torch.ones(1, 1, 1, 5, dtype=torch.bool), causal_mask(5)
    assert not torch.allclose(encoder(x, full)[:, :3], encoder(later, full)[:, :3])
    torch.testing.assert_close(encoder(x, causal)[:, :3], encoder(later, causal)[:, :3])
