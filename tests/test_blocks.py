"""Feed-forward, the norm around a sub-layer, and what a block may see."""

import torch
from torch import nn

from transformer_scratch.attention import causal_mask
from transformer_scratch.blocks import AddAndNorm, DecoderBlock, EncoderBlock, FeedForward


def test_feed_forward_is_equation_2():
    torch.manual_seed(0)
    network, x = FeedForward(4, 16), torch.randn(2, 3, 4)
    w1, b1, w2, b2 = network.parameters()
    expected = torch.clamp(x @ w1.T + b1, min=0) @ w2.T + b2
    torch.testing.assert_close(
        network(x),
        expected,
        msg="the feed-forward network is no longer max(0, xW1 + b1)W2 + b2, equation (2)",
    )


def test_add_and_norm_by_hand():
    """Post-norm: the sum is normalised, not the sub-layer's input."""
    x, sublayer_output = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, 3.0]])
    total = torch.tensor([1.0, 2.0, 6.0])
    expected = (total - 3) / (((total - 3) ** 2).mean() + 1e-5).sqrt()
    torch.testing.assert_close(
        AddAndNorm(3, dropout=0.0)(x, sublayer_output),
        expected[None],
        msg="a block is no longer post-norm, LayerNorm(x + Sublayer(x)), as in section 3.1",
    )


def test_only_the_output_of_sublayers_is_dropped():
    """With everything dropped that can be, no weight of a sub-layer has a say, and the input still
    has one: the residual path is not dropped (section 5.4)."""
    torch.manual_seed(0)
    block, x = EncoderBlock(8, 2, 32, dropout=0.5), torch.randn(2, 3, 8)
    for module in block.modules():
        if isinstance(module, nn.Dropout):
            module.forward = torch.zeros_like
    mask = torch.ones(2, 1, 1, 3, dtype=torch.bool)
    before = block(x, mask)
    for sublayer in (block.self_attention, block.feed_forward):
        for weight in sublayer.parameters():
            nn.init.normal_(weight)
    torch.testing.assert_close(block(x, mask), before, msg="a sub-layer's output is not dropped")
    assert not torch.allclose(block(x + torch.randn(8), mask), before)
    assert sum(isinstance(module, nn.Dropout) for module in block.modules()) == 2


def test_the_decoder_block_is_causal_and_the_encoder_block_is_not():
    torch.manual_seed(0)
    x = torch.randn(1, 5, 8)
    later = x.clone()
    later[:, 3:] = torch.randn(2, 8)
    memory = torch.randn(1, 4, 8)
    decoder = DecoderBlock(8, 2, 32, dropout=0.0)
    torch.testing.assert_close(decoder(x, memory, None)[:, :3], decoder(later, memory, None)[:, :3])
    encoder = EncoderBlock(8, 2, 32, dropout=0.0)
    full, causal = torch.ones(1, 1, 1, 5, dtype=torch.bool), causal_mask(5)
    assert not torch.allclose(encoder(x, full)[:, :3], encoder(later, full)[:, :3])
    torch.testing.assert_close(encoder(x, causal)[:, :3], encoder(later, causal)[:, :3])
