"""Is exercises/positions.py right? (PYTEST_DONT_REWRITE: a message is all that pytest shows.)"""

import math

import torch

from exercises.positions import add_positions, positional_encoding


def test_shape():
    for length, dim in ((6, 8), (3, 4)):
        encoding = positional_encoding(length, dim)
        assert isinstance(encoding, torch.Tensor), f"positional_encoding returns {encoding}"
        shape = tuple(encoding.shape)
        assert shape == (length, dim), (
            f"one row for each position: (length, dim) = {length, dim}, yours: {shape}"
        )
        assert encoding.dtype == torch.float32, (
            f"the encoding must be float32, as what it is added to; yours: {encoding.dtype}"
        )


def test_first_row_is_sin_and_cos_of_zero():
    row = positional_encoding(6, 8)[0].tolist()
    assert sorted(row) == [0] * 4 + [1] * 4, (
        f"position 0, the first, is sin(0), cos(0), sin(0), cos(0), ...; yours: {row}"
    )
    assert row == [0, 1] * 4, f"sines and cosines alternate: 0, 1, 0, 1, ...; yours: {row}"


def test_values():
    for dim, position, i in ((8, 1, 0), (8, 5, 1), (8, 3, 3), (4, 2, 1)):
        encoding = positional_encoding(6, dim)
        angle = position / 10000 ** (2 * i / dim)
        for column, function in ((2 * i, math.sin), (2 * i + 1, math.cos)):
            value, expected = encoding[position, column].item(), function(angle)
            assert math.isclose(value, expected, abs_tol=1e-5), (
                f"PE({position}, {column}) = {function.__name__}({position} / "
                f"10000^({2 * i}/{dim})) = {expected!r}, yours: {value!r}"
            )


def added_to(x: torch.Tensor) -> torch.Tensor:
    try:
        added = add_positions(x.clone())
    except RuntimeError:  # sizes that do not match
        raise AssertionError(
            f"x of {tuple(x.shape)} needs {x.size(1)} rows of {x.size(2)} numbers: "
            "positions run along axis 1, T"
        ) from None
    assert isinstance(added, torch.Tensor), f"add_positions returns {added}"
    assert added.shape == x.shape, f"(B, T, D) is {tuple(x.shape)}, yours: {tuple(added.shape)}"
    return added


def test_they_are_added():
    x = torch.randn(3, 5, 8)
    assert torch.allclose(added_to(x) - added_to(torch.zeros(3, 5, 8)), x, atol=1e-5), (
        "the encoding must be added to x, whatever is in it"
    )


def test_positions_run_along_time():
    added, encoding = added_to(torch.zeros(3, 5, 8)), positional_encoding(5, 8)
    assert added[0].equal(added[2]), (
        "two samples of a batch get different encodings: you added along the batch axis"
    )
    assert not added[0, 1].equal(added[0, 2]), "two positions of a sequence get the same encoding"
    assert not torch.allclose(added[1], -encoding), "the encoding must be added, not subtracted"
    assert torch.allclose(added[1], encoding), (
        "the rows of the encoding must be added in order of position"
    )
