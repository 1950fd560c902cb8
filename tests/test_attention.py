"""Attention against PyTorch's own, with weights copied: the same outputs and the same gradients."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from transformer_scratch.attention import (
    MultiHeadAttention,
    attention_weights,
    causal_mask,
    padding_mask,
    scaled_dot_product_attention,
)

B, H, T, S, K = 3, 4, 5, 7, 8
DIM = H * K


def make_mask(kind: str) -> torch.Tensor | None:
    """A mask of each shape that is in use, (1, 1, T, T) or (B, 1, 1, S)."""
    if kind == "none":
        return None
    if kind == "causal":
        return causal_mask(S)
    ids = torch.ones(B, S, dtype=torch.int64)
    ids[1, 4:] = 13
    ids[2, 1:] = 13
    return padding_mask(ids, pad_id=13)


@pytest.fixture(params=["fused", "formula"])
def kernel(request, monkeypatch) -> str:
    """The kernel that the model runs, and the formula in its place."""
    if request.param == "formula":

        def formula(query, key, value, attn_mask=None, is_causal=False):
            mask = causal_mask(query.size(2)) if is_causal else attn_mask
            return scaled_dot_product_attention(query, key, value, mask)

        monkeypatch.setattr(F, "scaled_dot_product_attention", formula)
    return request.param


def test_masks_are_true_where_attending_is_allowed():
    assert causal_mask(3).tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    ids = torch.tensor([[5, 13, 13], [5, 6, 7]])
    assert padding_mask(ids, pad_id=13).tolist() == [
        [[[True, False, False]]],
        [[[True, True, True]]],
    ]


def test_the_formula_by_hand():
    query, key = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[2.0, 0.0], [0.0, 3.0]]]])
    value = torch.tensor([[[[10.0, 0.0], [0.0, 20.0]]]])
    first = math.exp(2 / math.sqrt(2)) / (math.exp(2 / math.sqrt(2)) + math.exp(0))
    expected = torch.tensor([[[[10 * first, 20 * (1 - first)]]]])
    torch.testing.assert_close(scaled_dot_product_attention(query, key, value), expected)


@pytest.mark.parametrize("kind", ["none", "causal", "padding"])
def test_the_formula_equals_the_fused_kernel(kind):
    torch.manual_seed(0)
    shapes = [(B, H, S if kind == "causal" else T, K), (B, H, S, K), (B, H, S, K)]
    ours = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    mask = make_mask(kind)
    got, expected = (
        scaled_dot_product_attention(*ours, mask),
        F.scaled_dot_product_attention(*theirs, attn_mask=mask),
    )
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_weights_are_a_distribution_over_the_allowed_keys():
    torch.manual_seed(0)
    weights = attention_weights(
        torch.randn(B, H, T, K), torch.randn(B, H, S, K), make_mask("padding")
    )
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(B, H, T))
    assert (
        (weights[1, :, :, 4:] == 0).all()
        and (weights[2, :, :, 1:] == 0).all()
        and (weights >= 0).all()
    )


def input_weights(ours: MultiHeadAttention) -> list[nn.Parameter]:
    """W^Q, W^K and W^V, one above the other."""
    return [ours.query.weight, ours.key.weight, ours.value.weight]


def copy_of(ours: MultiHeadAttention) -> nn.MultiheadAttention:
    """nn.MultiheadAttention with our weights."""
    theirs = nn.MultiheadAttention(
        ours.output.in_features, ours.num_heads, bias=False, batch_first=True
    ).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat(input_weights(ours)))
        theirs.out_proj.weight.copy_(ours.output.weight)
    return theirs


@pytest.mark.parametrize("kind", ["none", "causal", "padding"])
@pytest.mark.parametrize("num_heads", [1, H])
@pytest.mark.parametrize("num_inputs", [1, 2], ids=["self", "cross"])
def test_equals_multihead_attention_of_pytorch(kernel, kind, num_heads, num_inputs):
    torch.manual_seed(0)
    ours = MultiHeadAttention(DIM, num_heads).double()
    theirs = copy_of(ours)
    inputs = [torch.randn(B, S, DIM).double().requires_grad_() for _ in range(num_inputs)]
    copies = [tensor.detach().clone().requires_grad_() for tensor in inputs]

    mask = make_mask(kind)
    got = ours(inputs[0], inputs[-1], mask)
    # PyTorch's convention is the opposite: True means that the key is hidden.
    hidden = {"none": {}, "causal": {"attn_mask": ~causal_mask(S)}}.get(kind)
    if kind == "padding":
        hidden = {"key_padding_mask": ~mask[:, 0, 0]}
    expected, _ = theirs(copies[0], copies[-1], copies[-1], **hidden)
    torch.testing.assert_close(got, expected)

    got.square().sum().backward()
    expected.square().sum().backward()
    gradients = torch.cat([weight.grad for weight in input_weights(ours)])
    torch.testing.assert_close(gradients, theirs.in_proj_weight.grad)
    torch.testing.assert_close(ours.output.weight.grad, theirs.out_proj.weight.grad)
    for one, other in zip(inputs, copies, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_causal_stands_for_the_causal_mask(kernel):
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(DIM, H), torch.randn(B, T, DIM)
    torch.testing.assert_close(layer(x, x, causal=True), layer(x, x, causal_mask(T)))
    assert not torch.allclose(layer(x, x, causal=True), layer(x, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_without_any_key_stays_finite(kernel, dtype):
    torch.manual_seed(0)
    layer = MultiHeadAttention(DIM, H).to(dtype)
    x = torch.randn(B, T, DIM, dtype=dtype, requires_grad=True)
    memory = torch.randn(B, S, DIM, dtype=dtype, requires_grad=True)
    mask = padding_mask(torch.full((B, S), 13), pad_id=13)
    mask[0] = True  # one row as usual beside those with nothing to attend to
    result = layer(x, memory, mask)
    assert result.isfinite().all()
    assert (result[1:] == 0).all(), "weights of zero add up to nothing"
    result.float().square().sum().backward()
    for gradient in [x.grad, memory.grad, *(parameter.grad for parameter in layer.parameters())]:
        assert gradient.isfinite().all()
    assert memory.grad[0].any() and not memory.grad[1:].any()


def test_hidden_keys_change_nothing(kernel):
    torch.manual_seed(0)
    layer, x, memory = MultiHeadAttention(DIM, H), torch.randn(B, T, DIM), torch.randn(B, S, DIM)
    mask = make_mask("padding")
    changed = memory.clone()
    changed[1, 4:] = 1e3
    torch.testing.assert_close(layer(x, memory, mask), layer(x, changed, mask))
    assert not torch.allclose(layer(x, memory), layer(x, changed))


def test_heads_must_divide_dim():
    with pytest.raises(ValueError, match=r"dim 10 .* num_heads 3"):
        MultiHeadAttention(10, 3)
