"""The whole model: against nn.Transformer with weights copied, and for what a Transformer must and
must not see."""

import math

import pytest
import torch
from samples import Counting, padded_batch
from torch import nn
from torch.nn import functional as F

from transformer_scratch.attention import MultiHeadAttention, causal_mask
from transformer_scratch.model import Transformer, positional_encoding

TASK = Counting()
V, PAD = TASK.vocab_size, TASK.pad_id


def make_model(**settings) -> Transformer:
    torch.manual_seed(0)
    settings = {
        "dim": 16,
        "num_heads": 2,
        "num_layers": 2,
        "dropout": 0.0,
        "pad_id": PAD,
    } | settings
    return Transformer(V, **settings).double()


def make_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten digits with padding behind short runs: source (B, S), decoder_input and target (B, T)."""
    return padded_batch(TASK, [(0, 9), (4, 4), (8, 3), (2, 5)])


# ---------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("dim", [2, 7, 32, 512])
def test_positions_are_the_closed_form(dim):
    """Section 3.5, one element at a time; an odd dim ends with a sine."""
    table = positional_encoding(40, dim)
    assert table.shape == (40, dim)
    for position in range(40):
        for i in range(dim):
            angle = position / 10000 ** (2 * (i // 2) / dim)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert table[position, i].item() == pytest.approx(expected, abs=2e-5)


def test_sequences_longer_than_max_len_need_no_change_of_the_model():
    """Also in inference mode, where a tensor that was kept could not be trained with afterwards."""
    model, longer = make_model(max_len=4), make_model(max_len=64)
    source, decoder_input, target = make_batch()
    positions = model.positions
    with torch.inference_mode():
        model(source, decoder_input)
    assert model.positions is positions and len(positions) == 4
    logits = model(source, decoder_input)
    torch.testing.assert_close(logits, longer(source, decoder_input))
    F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD).backward()


def test_embedding_is_scaled_and_positions_run_along_time():
    model = make_model()
    ids = torch.tensor([[3, 3, 3], [5, 5, 5]])
    vectors = model.embed(ids, model.source_embedding) - positional_encoding(3, 16).double()
    torch.testing.assert_close(vectors, 4 * model.source_embedding.weight[ids])  # sqrt(16) = 4


# --------------------------------------------------------------------------- against nn.Transformer


def projections(attention: MultiHeadAttention) -> list[nn.Linear]:
    """W^Q, W^K and W^V, in PyTorch's order."""
    return [attention.query, attention.key, attention.value]


def copy_of(ours: Transformer, ffn_dim: int) -> nn.Transformer:
    """nn.Transformer with our weights: post-norm, ReLU, and no norm after the last block, which
    the paper has not."""
    settings = {
        "dim_feedforward": ffn_dim,
        "dropout": 0.0,
        "activation": "relu",
        "batch_first": True,
    }
    num_heads, num_layers = ours.encoder[0].self_attention.num_heads, len(ours.encoder)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(ours.dim, num_heads, **settings),
        num_layers,
        enable_nested_tensor=False,
    )
    decoder = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(ours.dim, num_heads, **settings), num_layers
    )
    theirs = nn.Transformer(
        ours.dim, num_heads, custom_encoder=encoder, custom_decoder=decoder, batch_first=True
    )

    @torch.no_grad()
    def copy_attention(theirs: nn.MultiheadAttention, ours: MultiHeadAttention) -> None:
        theirs.in_proj_weight.copy_(
            torch.cat([projection.weight for projection in projections(ours)])
        )
        theirs.out_proj.weight.copy_(ours.output.weight)
        theirs.in_proj_bias.zero_()
        theirs.out_proj.bias.zero_()

    for layer, block in zip(
        [*encoder.layers, *decoder.layers], [*ours.encoder, *ours.decoder], strict=True
    ):
        copy_attention(layer.self_attn, block.self_attention)
        norms = [block.self_attention_norm, block.feed_forward_norm]
        if block in [*ours.decoder]:
            copy_attention(layer.multihead_attn, block.cross_attention)
            norms.insert(1, block.cross_attention_norm)
        layer.linear1.load_state_dict(block.feed_forward[0].state_dict())
        layer.linear2.load_state_dict(block.feed_forward[2].state_dict())
        for number, norm in enumerate(norms, start=1):
            getattr(layer, f"norm{number}").load_state_dict(norm.norm.state_dict())
    return theirs.double()


@pytest.mark.parametrize("num_heads", [1, 4])
def test_equals_nn_transformer_with_masks(num_heads):
    ours = make_model(num_heads=num_heads, ffn_dim=24)
    theirs = copy_of(ours, ffn_dim=24)
    source, decoder_input, target = make_batch()
    hidden = source == PAD
    target_hidden = ~causal_mask(decoder_input.size(1))

    embedding = (
        ours.source_embedding.weight.detach().clone().requires_grad_()
    )  # tied: all three in one

    def embed(ids: torch.Tensor) -> torch.Tensor:
        return (
            F.embedding(ids, embedding) * math.sqrt(ours.dim)
            + positional_encoding(ids.size(1), ours.dim).double()
        )

    features = theirs(
        embed(source),
        embed(decoder_input),
        tgt_mask=target_hidden,
        src_key_padding_mask=hidden,
        memory_key_padding_mask=hidden,
    )
    expected = features @ embedding.T
    got = ours(source, decoder_input)
    torch.testing.assert_close(
        got,
        expected,
        msg="the model is no longer the paper's, as nn.Transformer computes it: post-norm, ReLU, "
        "no norm after the last block",
    )

    for logits in (got, expected):
        F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD).backward()
    torch.testing.assert_close(ours.source_embedding.weight.grad, embedding.grad)
    layers = [*theirs.encoder.layers, *theirs.decoder.layers]
    for block, layer in zip([*ours.encoder, *ours.decoder], layers, strict=True):
        attention = block.self_attention
        gradients = torch.cat([projection.weight.grad for projection in projections(attention)])
        torch.testing.assert_close(gradients, layer.self_attn.in_proj_weight.grad)
        gradient = attention.output.weight.grad
        torch.testing.assert_close(gradient, layer.self_attn.out_proj.weight.grad)
        torch.testing.assert_close(block.feed_forward[0].weight.grad, layer.linear1.weight.grad)
        torch.testing.assert_close(
            block.self_attention_norm.norm.weight.grad, layer.norm1.weight.grad
        )
        if hasattr(layer, "multihead_attn"):
            cross = projections(block.cross_attention)
            gradients = torch.cat([projection.weight.grad for projection in cross])
            torch.testing.assert_close(gradients, layer.multihead_attn.in_proj_weight.grad)


# --------------------------------------------------------------- what the model may and may not see


def test_no_position_sees_a_later_token():
    model = make_model()
    source, decoder_input, _ = make_batch()
    logits = model(source, decoder_input)
    for t in range(1, decoder_input.size(1)):
        changed = decoder_input.clone()
        changed[:, t:] = (changed[:, t:] + 1) % V
        later = model(source, changed)
        torch.testing.assert_close(later[:, :t], logits[:, :t])
        assert not torch.allclose(later[:, t], logits[:, t]), "the token itself does count"


def test_padding_of_the_source_changes_nothing():
    model = make_model()
    source, decoder_input, _ = make_batch()
    torch.testing.assert_close(model(source[:, :4], decoder_input), model(source, decoder_input))
    torch.testing.assert_close(model.encode(source[:, :4]), model.encode(source)[:, :4])


def test_without_padding_no_mask_is_needed(monkeypatch):
    model = make_model()
    source, decoder_input, _ = make_batch()
    expected = model(source[:, :4], decoder_input)
    monkeypatch.setattr("transformer_scratch.model.padding_mask", None)
    got = model(source[:, :4], decoder_input, source_is_padded=False)
    torch.testing.assert_close(got, expected)
    with pytest.raises(TypeError):
        model(source, decoder_input)


def test_padding_of_the_target_changes_no_loss_and_no_gradient():
    model = make_model()
    source, decoder_input, target = make_batch()
    gradients = []
    for end in (15, 11):  # 11: the longest of this batch
        model.zero_grad()
        logits = model(source, decoder_input[:, :end])
        F.cross_entropy(
            logits.flatten(0, 1), target[:, :end].flatten(), ignore_index=PAD
        ).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_sample_does_not_depend_on_its_row_or_neighbours():
    model = make_model()
    source, decoder_input, _ = make_batch()
    logits = model(source, decoder_input)
    torch.testing.assert_close(model(source.flip(0), decoder_input.flip(0)).flip(0), logits)
    for row in range(len(source)):
        alone = model(source[row : row + 1], decoder_input[row : row + 1])
        torch.testing.assert_close(alone[0], logits[row])


def test_the_order_of_the_source_matters():
    model = make_model()
    a, b = torch.tensor([TASK.encode_source((8, 4)), TASK.encode_source((4, 8))]).split(1)
    start = torch.tensor([[TASK.start_id]])
    assert (model(a, start) - model(b, start)).abs().max() > 1e-3


def test_a_source_of_padding_alone_stays_finite():
    model = make_model()
    source, decoder_input, target = make_batch()
    source[1] = PAD
    logits = model(source, decoder_input)
    assert logits.isfinite().all()
    F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_dropout_acts_in_training_alone():
    model = make_model(dropout=0.5)
    source, decoder_input, _ = make_batch()
    assert not torch.equal(model(source, decoder_input), model(source, decoder_input))
    model.eval()
    assert torch.equal(model(source, decoder_input), model(source, decoder_input))


# -------------------------------------------------------------------------------- sizes and weights


def test_the_papers_base_model():
    """--dim 512 --num-heads 8: 6 + 6 layers, heads of 64, feed-forward 2048 (section 3.3, table
    3)."""
    with torch.device("meta"):  # shapes without memory
        model = Transformer(37000, dim=512, num_heads=8, num_layers=6)
    assert len(model.encoder) == len(model.decoder) == 6
    assert model.encoder[0].feed_forward[0].weight.shape == (2048, 512)
    attention = model.decoder[5].cross_attention
    assert {projection.weight.shape for projection in projections(attention)} == {(512, 512)}
    assert attention.split_heads(torch.empty(2, 7, 512, device="meta")).shape == (2, 8, 7, 64)
    # By hand: 4 d^2 an attention, 2 d f + f + d a feed-forward, 2 d a norm, and one matrix of
    # embeddings.
    d, f = 512, 2048
    encoder, decoder = 4 * d * d + 2 * d * f + f + d + 4 * d, 8 * d * d + 2 * d * f + f + d + 6 * d
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == 37000 * d + 6 * (encoder + decoder), "the paper's model has other weights"


def test_logits_have_the_contracts_shape():
    model = Transformer(
        vocab_size=V,
        dim=8,
        num_heads=2,
        num_layers=1,
        ffn_dim=16,
        dropout=0.1,
        tie_embeddings=True,
        pad_id=PAD,
    )
    source, decoder_input, _ = make_batch()
    assert model(source, decoder_input).shape == (4, 15, V)
    memory = model.encode(source)
    assert memory.shape == (4, 16, 8) and model.decode(decoder_input, memory).shape == (4, 15, V)


def test_tied_and_untied_embeddings():
    tied, untied = make_model(), make_model(tie_embeddings=False)
    assert tied.source_embedding.weight is tied.target_embedding.weight is tied.output.weight
    layers = (untied.source_embedding, untied.target_embedding, untied.output)
    assert len({id(layer.weight) for layer in layers}) == 3
    numbers = [
        sum(parameter.numel() for parameter in model.parameters()) for model in (tied, untied)
    ]
    assert numbers[1] - numbers[0] == 2 * V * 16
    # A loaded state stays tied.
    tied.load_state_dict(make_model().state_dict())
    assert tied.source_embedding.weight is tied.output.weight


@pytest.mark.parametrize("dim, num_heads", [(32, 1), (128, 4)])
def test_the_first_loss_is_near_chance(dim, num_heads):
    """ln(14) = 2.64 is what a model without an opinion has. With PyTorch's own N(0, 1) it
    starts far above."""

    def first_loss(tie_embeddings: bool, std: float | None = None) -> float:
        model = make_model(
            dim=dim, num_heads=num_heads, num_layers=6, tie_embeddings=tie_embeddings
        )
        if std:
            for weight in {
                model.source_embedding.weight,
                model.target_embedding.weight,
                model.output.weight,
            }:
                nn.init.normal_(weight, std=std)
        source, decoder_input, target = make_batch()
        with torch.no_grad():
            logits = model(source, decoder_input)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD).item()

    assert first_loss(False) < 1.5 * math.log(V)
    assert first_loss(True) < 6 * math.log(V)
    for tied in (False, True):
        assert first_loss(tied, std=1.0) > 2 * first_loss(tied)


def test_dim_must_be_divisible_by_heads():
    with pytest.raises(ValueError, match=r"dim 10 .* num_heads 3"):
        Transformer(V, dim=10, num_heads=3)
