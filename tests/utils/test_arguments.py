import numpy as np

from kspec_guidance.utils.arguments import is_integer, is_number


def test_numbers_of_numpy_are_numbers():
    assert is_integer(np.int64(2), 1)
    assert is_number(np.float32(0.5))
    assert not is_integer(np.int64(0), 1)
    assert not is_integer(np.bool_(True))
