"""Is exercises/positions.py right? (PYTEST_DONT_REWRITE: a message is all that pytest shows.)"""

import math

import torch

from exercises.positions import add_positions, positional_encoding


def test_shape():
    shape = tuple(positional_encoding(6, 8).shape)
    assert shape == (6, 8), f"one row for each position: (length, dim) = (6, 8), yours: {shape}"


def test_first_row_is_sin_and_cos_of_zero():
    row = positional_encoding(6, 8)[0].tolist()
    assert sorted(row) == [0] * 4 + [1] * 4, (
        f"position 0, the first, is sin(0), cos(0), sin(0), cos(0), ...; yours: {row}"
    )
    assert row == [0, 1] * 4, f"sines and cosines alternate: 0, 1, 0, 1, ...; yours: {row}"


def test_values():
    encoding = positional_encoding(6, 8)
    for position, i in ((1, 0), (5, 1), (3, 3)):
        angle = position / 10000 ** (2 * i / 8)
        for column, function in ((2 * i, math.sin), (2 * i + 1, math.cos)):
            value, expected = encoding[position, column].item(), function(angle)
            assert math.isclose(value, expected, abs_tol=1e-5), (
                f"PE({position}, {column}) = {function.__name__}({position} / 10000^({2 * i}/8)) "
                f"= {expected!r}, yours: {value!r}"
            )


def test_positions_run_along_time():
    # As many samples as positions, so that an encoding of the wrong axis can be added, too.
    added = add_positions(torch.zeros(5, 5, 8))
    assert added.shape == (5, 5, 8), f"(B, T, D) is (5, 5, 8) here, yours: {tuple(added.shape)}"
    assert added[0].equal(added[2]), (
        "two samples of a batch get different encodings: you added along the batch axis"
    )
    assert not added[0, 1].equal(added[0, 2]), "two positions of a sequence get the same encoding"
    assert torch.allclose(added[1], positional_encoding(5, 8)), (
        "the rows of the encoding must be added in order of position"
    )


def test_they_are_added():
    x = torch.randn(3, 5, 8)
    assert torch.allclose(add_positions(x.clone()), x + positional_encoding(5, 8)), (
        "the encoding must be added to x, whatever is in it"
    )
