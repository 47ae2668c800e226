import numpy as np
import pytest

from edgeq.tiled import product, times


@pytest.mark.parametrize("shape", [(64, 64, 64), (1, 1, 1), (3, 200, 65), (130, 0, 7), (0, 5, 5), (70, 64, 192), (2, 3, 0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_product_is_that_of_numpy(shape: tuple[int, int, int], dtype: type) -> None:
    m, k, n = shape
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
    found = product(a, b)
    assert (found.shape, found.dtype) == ((m, n), dtype)
    np.testing.assert_allclose(found, a @ b, atol=1e-4 if dtype == np.float32 else 1e-12)  # sums in another order
    np.testing.assert_allclose(product(a[:, ::-1], b[::-1]), a @ b, atol=1e-4)  # strides do not matter
    np.testing.assert_allclose(times(a, np.ones(k, dtype)), a.sum(1), atol=1e-4)
