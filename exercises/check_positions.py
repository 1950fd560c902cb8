"""Is exercises/positions.py right?"""

import math

import torch

from exercises.positions import add_positions, positional_encoding


def test_shape():
    shape = tuple(positional_encoding(6, 8).shape)
    assert shape == (6, 8), f"one row for each position: (length, dim) = (6, 8), yours: {shape}"


def test_first_row_is_sin_and_cos_of_zero():
    row = positional_encoding(6, 8)[0].tolist()
    assert row == [0, 1] * 4, (
        "position 0 is sin(0), cos(0), sin(0), cos(0), ...: sines and cosines alternate; "
        f"yours: {row}"
    )


def test_values():
    encoding = positional_encoding(6, 8)
    for position, i in ((1, 0), (5, 1), (3, 3)):
        angle = position / 10000 ** (2 * i / 8)
        for column, function in ((2 * i, math.sin), (2 * i + 1, math.cos)):
            value, expected = encoding[position, column].item(), function(angle)
            assert math.isclose(value, expected, abs_tol=1e-5), (
                f"PE({position}, {column}) = {function.__name__}({position} / 10000^({2 * i}/8)) "
                f"= {expected:.5f}, yours: {value:.5f}"
            )


def test_positions_run_along_time():
    added = add_positions(torch.zeros(3, 5, 8))
    assert added[0].equal(added[2]), (
        "two samples of a batch get different encodings: you added along the batch axis"
    )
    assert not added[0, 1].equal(added[0, 2]), "two positions of a sequence get the same encoding"
    assert torch.allclose(added[1], positional_encoding(5, 8)), (
        "the rows of the encoding must be added in order of position"
    )
