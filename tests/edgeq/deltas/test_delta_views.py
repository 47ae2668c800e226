"""Views of deltas agree with what `apply` does: factors, sparse entries, rows and parts of fused matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.deltas import blocks, lora, rotation
from edgeq.deltas.decomposed import KaSA, LoLDU, ldu
from edgeq.deltas.delta import Additive, Array, Change, ChangeRows, Delta, Part, Replace, SetRows, Then, split_rows
from edgeq.deltas.hadamard import HiRA, LoHa, LoKr
from edgeq.deltas.index_map import IndexMap, query_rows, recover, restrict
from edgeq.deltas.lora import DoRA, LoRA
from edgeq.deltas.manifest import Einsum
from edgeq.deltas.scaling import RoAd, Scale
from edgeq.deltas.spectral import Circulant, Entries, Fourier, Hadamard, SHiRA, Wavelet, hadamard_transform
from edgeq.deltas.wavelets import daubechies
from edgeq.errors import ShapeError, UnsupportedError

RNG = np.random.default_rng(0)
N_OUT, N_IN = 48, 64


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape)


def low(rank: int = 3, n_out: int = N_OUT, n_in: int = N_IN) -> LoRA:
    return LoRA(a=normal(rank, n_in), b=normal(n_out, rank), scale=0.5)


def entries(n: int = 20) -> Entries:
    places = RNG.permutation(N_OUT * N_IN)[:n]
    return Entries(rows=places // N_IN, cols=places % N_IN, values=normal(n), shape=(N_OUT, N_IN))


BASE = normal(N_OUT, N_IN)
# kind -> (delta, whether it has factors, whether it has sparse entries, whether rows stand alone)
KINDS: dict[str, tuple[Delta, bool, bool, bool]] = {
    "LoRA": (low(), True, False, True),
    "LoRA core": (lora.with_core(normal(3, N_IN), normal(3, 3), normal(N_OUT, 3), 2.0), True, False, True),
    "LoRA diagonal": (lora.with_diagonal(normal(3, N_IN), normal(3), normal(N_OUT, 3)), True, False, True),
    "VeRA": (lora.vera(normal(5, N_IN), normal(N_OUT, 5), normal(5), normal(N_OUT)), True, False, True),
    "DeLoRA": (lora.delora(normal(3, N_IN), normal(N_OUT, 3), 2.0, normal(N_IN) ** 2), True, False, True),
    "MiSS": (blocks.miss(normal(7, N_OUT), N_IN), True, False, True),
    "MiSS bat": (blocks.MissBat(block=normal(6, 8, 8), n_in=N_IN), False, False, True),
    "GraLoRA": (blocks.gralora(normal(2, 32, 4), normal(2, 4, 24), 0.5), True, False, True),
    "DoRA": (DoRA(lora=low(), magnitude=normal(N_OUT)), False, False, True),
    "DoRA columns": (DoRA(lora=low(), magnitude=normal(N_IN), axis=0), False, False, False),
    "LoHa": (LoHa(first=low(2), second=low(3)), True, False, True),
    "LoHa of high rank": (LoHa(first=low(8), second=low(8)), False, False, True),
    "LoKr": (LoKr(left=normal(8, 4), right=low(2, 6, 16), scale=0.3), True, False, False),
    "LoKr dense": (LoKr(left=normal(8, 4), right=normal(6, 16)), False, False, False),
    "HiRA": (HiRA(product=low()), False, False, True),
    "IA3 outputs": (Scale(vector=normal(N_OUT), base_shape=(N_OUT, N_IN), axis=0), False, False, True),
    "IA3 inputs": (Scale(vector=normal(N_IN), base_shape=(N_OUT, N_IN), axis=1), False, False, True),
    "RoAd": (RoAd(cos=normal(N_OUT), sin=normal(N_OUT), group=8, base_shape=(N_OUT, N_IN)), False, False, False),
    "OFT": (rotation.BlockRotation(blocks=rotation.cayley(rotation.skew(normal(8, 28), 8)), n_out=N_OUT), False, False, True),
    "BOFT": (
        rotation.Butterfly(
            blocks=np.stack([rotation.cayley(rotation.skew(normal(8, 28), 8)) for _ in range(2)]),
            orders=tuple(rotation.butterfly_order(N_IN, 8 // 2**i, 4) for i in range(2)),
            scale=normal(N_OUT),
        ),
        False,
        False,
        True,
    ),
    "HRA": (rotation.Householder(u=normal(N_IN, 4), n_out=N_OUT), True, False, True),
    "HRA orthogonal": (rotation.Householder(u=normal(N_IN, 4), n_out=N_OUT, orthogonal=True), True, False, True),
    "SHiRA": (SHiRA(entries=entries(), scale=0.5), False, True, True),
    "Fourier": (Fourier(entries=entries(), scale=200.0), False, False, False),
    "Wavelet": (Wavelet(entries=entries(), scale=2.0, family="db3"), False, False, False),
    "Hadamard": (Hadamard(entries=entries(), scale=2.0), False, False, False),
    "C3A": (Circulant(kernel=normal(6, 8, 8)), False, False, False),
    "LoLDU": (LoLDU(z=normal(6), base_shape=(N_OUT, N_IN), scale=0.5), True, False, False),
    "KaSA": (KaSA(lora=low()), False, False, False),
    "einsum": (Einsum(subscripts="oa,ai->oi", operands=(normal(N_OUT, 5), normal(5, N_IN)), out=(N_OUT, N_IN)), False, False, False),
    "tokens": (SetRows(np.array([3, 40]), normal(2, N_IN), (N_OUT, N_IN)), False, True, True),
    "saved": (Replace(normal(N_OUT, N_IN), (N_OUT, N_IN)), False, False, True),
    "saved, then LoRA": (Then(Replace(normal(N_OUT, N_IN), (N_OUT, N_IN)), low()), False, False, True),
    "sum": (Change(normal(N_OUT, N_IN)), False, False, True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_views_agree_with_apply(kind: str) -> None:
    delta, has_factors, has_sparse, has_rows = KINDS[kind]
    before = BASE.copy()
    result = delta.apply(BASE)
    assert delta.shape == delta.out_shape == BASE.shape == result.shape
    assert np.abs(result - BASE).max() > 0.01
    np.testing.assert_array_equal(BASE, before)  # arguments stay as they are
    np.testing.assert_allclose(delta.apply(BASE, BASE), result)

    factors = delta.factors(BASE)
    assert (factors is not None) == has_factors
    if factors is not None:
        np.testing.assert_allclose(BASE + factors.product(), result, atol=1e-9)
        assert factors.rank < min(BASE.shape)
    sparse = delta.sparse(BASE)
    assert (sparse is not None) == has_sparse
    if sparse is not None:
        patched = BASE.copy()
        patched[sparse.rows, sparse.cols] += sparse.values
        np.testing.assert_allclose(patched, result, atol=1e-12)
        assert len(set(zip(sparse.rows.tolist(), sparse.cols.tolist(), strict=True))) == len(sparse.values)
    part = delta.rows(16, 32)
    assert (part is not None) == has_rows
    if part is not None:
        assert part.shape == (16, N_IN)
        np.testing.assert_allclose(part.apply(BASE[16:32]), result[16:32], atol=1e-12)
    if isinstance(delta, Additive):
        np.testing.assert_allclose(BASE + delta.change(), result)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_matrices_come_apart(kind: str) -> None:
    """Three pieces of a matrix, each adapted on its own, are what the whole becomes."""
    delta = KINDS[kind][0]
    pieces = split_rows(delta, (("q", 16), ("k", 8), ("v", 24)))
    result = delta.apply(BASE)
    for (name, piece), start in zip(pieces.items(), (0, 16, 24), strict=True):
        stop = start + piece.shape[0]
        base = BASE if isinstance(piece, Part) else None
        np.testing.assert_allclose(piece.apply(BASE[start:stop], base), result[start:stop], atol=1e-12, err_msg=name)
    assert split_rows(delta, (("one", N_OUT),)) == {"one": delta}


def test_a_part_needs_the_whole() -> None:
    part = split_rows(KINDS["KaSA"][0], (("q", 16), ("k", 32)))["q"]
    assert isinstance(part, Part)
    with pytest.raises(ShapeError, match="rows 0 to 16 of q, k follow from all of them: pass them joined as base"):
        part.apply(BASE[:16])
    assert isinstance(split_rows(KINDS["Fourier"][0], (("q", 16), ("k", 32)))["k"], ChangeRows)


def test_rotations_are_orthogonal_and_the_series_comes_close() -> None:
    small = rotation.skew(0.02 * normal(4, 28), 8)
    exact = rotation.cayley(small)
    np.testing.assert_allclose(exact @ exact.swapaxes(1, 2), np.broadcast_to(np.eye(8), exact.shape), atol=1e-12)
    np.testing.assert_allclose(rotation.cayley_neumann(-small, 5), exact, atol=1e-3)
    errors = [np.abs(rotation.cayley_neumann(-small, terms) - exact).max() for terms in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    np.testing.assert_array_equal(rotation.cayley_neumann(small, 1), np.broadcast_to(np.eye(8), small.shape))
    norms = np.linalg.norm(rotation.constrain(np.concatenate([small, 0 * small[:1]]), 0.1), axis=(1, 2))
    np.testing.assert_allclose(norms, [*[0.1 / 5**0.5] * 4, 0.0])
    units = rotation.Householder(u=normal(16, 5), n_out=1, orthogonal=True).units()
    np.testing.assert_allclose(units.T @ units, np.eye(5), atol=1e-12)


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 1000))
def test_ldu_rebuilds_the_matrix(n_out: int, n_in: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=(n_out, n_in))
    left, diagonal, right = ldu(matrix)
    np.testing.assert_allclose((left * diagonal) @ right, matrix, atol=1e-9)
    assert np.abs(left).max() <= 1.0
    np.testing.assert_allclose(np.diagonal(right), 1.0)


def test_ldu_of_a_singular_matrix() -> None:
    with pytest.raises(ShapeError, match=r"pivot 0 is zero\. LoLDU adapters need a base of full rank"):
        ldu(np.zeros((3, 3)))


def test_loldu_of_the_bases_own_diagonal_changes_nothing() -> None:
    _, diagonal, _ = ldu(BASE)
    np.testing.assert_allclose(LoLDU(z=diagonal[:9], base_shape=(N_OUT, N_IN), scale=0.7).apply(BASE), BASE, atol=1e-9)


def test_kasa_leaves_a_truncated_base_alone() -> None:
    """PEFT truncates when it loads; a base saved after that has lost those values already."""
    zero = LoRA(a=np.zeros((3, N_IN)), b=np.zeros((N_OUT, 3)))
    once = KaSA(lora=zero).apply(BASE)
    assert np.linalg.matrix_rank(once) == N_OUT - 3
    np.testing.assert_allclose(KaSA(lora=zero).apply(once), once, atol=1e-9)
    with pytest.raises(ShapeError, match="KaSA drops 48 singular values of a matrix that has 48"):
        KaSA(lora=LoRA(a=normal(48, N_IN), b=normal(N_OUT, 48))).apply(BASE)


def test_the_hadamard_transform_is_sylvesters() -> None:
    matrix = np.ones((1, 1))
    for _ in range(6):
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
    np.testing.assert_allclose(hadamard_transform(BASE), BASE @ matrix, atol=1e-10)


@pytest.mark.parametrize("n", range(1, 11))
def test_daubechies_filters_are_orthonormal_with_vanishing_moments(n: int) -> None:
    low_pass = np.array(daubechies(n))
    for shift in range(n):
        product = low_pass[2 * shift :] @ low_pass[: len(low_pass) - 2 * shift]
        assert product == pytest.approx(1.0 if shift == 0 else 0.0, abs=1e-10)
    high_pass = low_pass[::-1] * (-1.0) ** np.arange(2 * n)
    for moment in range(n):
        assert high_pass @ (np.arange(2 * n) / (2.0 * n)) ** moment == pytest.approx(0.0, abs=1e-6)


def test_an_unknown_wavelet() -> None:
    with pytest.raises(UnsupportedError, match=r"wavelet 'coif2' is not supported; supported: haar, db1 to db10, sym2, sym3"):
        Wavelet(entries=entries(), scale=1.0, family="coif2").change()


@given(st.data())
def test_restrict_undoes_recover(data: st.DataObject) -> None:
    full = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))

    def some(n: int) -> np.ndarray | None:
        chosen = data.draw(st.one_of(st.none(), st.lists(st.integers(0, n - 1), min_size=1, unique=True)))
        return None if chosen is None else np.array(chosen, dtype=np.intp)

    index = IndexMap(full=full, rows=some(full[0]), cols=some(full[1]))
    rng = np.random.default_rng(1)
    small = LoRA(a=rng.normal(size=(2, index.small[1])), b=rng.normal(size=(index.small[0], 2)), scale=3.0)
    wide = recover(small, index)
    assert wide.shape == full
    back = restrict(wide, index)
    np.testing.assert_array_equal(back.a, small.a)
    np.testing.assert_array_equal(back.b, small.b)
    rows = slice(None) if index.rows is None else index.rows
    cols = slice(None) if index.cols is None else index.cols
    np.testing.assert_allclose(wide.change()[rows][:, cols], small.change(), atol=1e-12)
    assert np.abs(wide.change()).sum() == pytest.approx(np.abs(small.change()).sum())


def test_query_rows_follow_their_kv_head() -> None:
    np.testing.assert_array_equal(query_rows(np.array([1]), 2, 3), np.arange(6, 12))


# what is wrong -> (how it is made, message)
FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "factors": (lambda: LoRA(a=normal(3, 4), b=normal(5, 2)), r"LoRA factors of shapes \[5, 2\] and \[3, 4\] do not multiply"),
    "rank 0": (lambda: LoRA(a=normal(0, 4), b=normal(5, 0)), "LoRA factors have rank 0"),
    "magnitude": (lambda: DoRA(lora=low(), magnitude=normal(5)), r"DoRA's magnitude has shape \[5\], expected \[48\]"),
    "core": (lambda: lora.with_core(normal(3, 4), normal(2, 2), normal(5, 3)), r"the latent core has shape \[2, 2\], expected \[3, 3\]"),
    "diagonal": (lambda: lora.with_diagonal(normal(3, 4), normal(2), normal(5, 3)), r"the diagonal has shape \[2\], expected \[3\]"),
    "rank": (lambda: lora.truncate(low(3), 4, scale=1.0), "rank 4 was asked of an adapter of rank 3. Choose 1 to 3"),
    "nested scale": (lambda: lora.matryoshka_scale(2, "cube"), "unknown Matryoshka scale 'cube'; known: none, linear, sqrt"),
    "products": (lambda: LoHa(first=low(2), second=low(2, 8, 8)), r"LoHa's products have shapes \[48, 64\] and \[8, 8\], which differ"),
    "scaling": (lambda: Scale(vector=normal(3), base_shape=(4, 5), axis=0), r"the scaling vector has shape \[3\], expected \[4\]"),
    "tiles": (lambda: blocks.MissBat(block=normal(6, 7, 7), n_in=64), r"MiSS blocks of shape \[6, 7, 7\] do not tile 64 inputs"),
    "gralora": (lambda: blocks.gralora(normal(2, 4, 3), normal(2, 3, 4), 1.0), "GraLoRA's rank 3 does not divide into 2 blocks"),
    "bases": (
        lambda: blocks.randlora(normal(4, 1, 8), normal(8, 2, 4), normal(4, 2), normal(2, 9), shape=(9, 9), scale=1.0),
        r"RandLoRA's bases \[4, 1, 8\] and \[8, 2, 4\] are too small for a module of 9 x 9 and 2 bases",
    ),
    "position": (
        lambda: Entries(rows=np.array([1, 9]), cols=np.array([0, 0]), values=normal(2), shape=(4, 4)),
        r"position \(9, 0\) is outside a matrix of 4 x 4",
    ),
    "counts": (
        lambda: Entries(rows=np.array([1]), cols=np.array([0]), values=normal(2), shape=(4, 4)),
        "2 values have 1 row and 1 column positions",
    ),
    "butterfly": (lambda: rotation.butterfly_order(12, 8, 4), "12 inputs do not divide into 8 butterflies of pieces of 4"),
    "triangle": (lambda: rotation.skew(normal(2, 5), 4), r"the rotation's parameters has shape \[2, 5\], expected \[2, 6\]"),
    "replacement": (lambda: Replace(normal(4, 5), (4, 6)), r"a tensor of shape \[4, 5\] cannot replace one of shape \[4, 6\]"),
    "token": (lambda: SetRows(np.array([5]), normal(1, 3), (4, 3)), "rows 5 to 5 are not all within 4 rows"),
    "tokens": (lambda: SetRows(np.array([1]), normal(2, 3), (4, 3)), r"1 rows of 3 values were promised, \[2, 3\] came"),
    "index map": (lambda: IndexMap(full=(4, 4), rows=np.array([1, 1])), "the index map's rows must be distinct numbers from 0 to 3"),
    "recover": (lambda: recover(low(), IndexMap(full=(9, 9))), r"fits a matrix of \[48, 64\], the index map leads from \[9, 9\]"),
    "restrict": (lambda: restrict(low(), IndexMap(full=(9, 9))), r"fits a matrix of \[48, 64\], the index map leads to \[9, 9\]"),
    "diagonal of LoLDU": (
        lambda: LoLDU(z=normal(9), base_shape=(4, 5), scale=1.0),
        r"LoLDU's diagonal has shape \[9\]; expected 1 to 4 values",
    ),
    "einsum": (lambda: Einsum(subscripts="ab->ba", operands=(normal(3),), out=(3, 1)).change(), "einsum 'ab->ba' does not fit operands of"),
    "einsum size": (
        lambda: Einsum(subscripts="ab->ba", operands=(normal(3, 2),), out=(3, 3)).change(),
        r"gives \[2, 3\], which does not reshape to \[3, 3\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str) -> None:
    make, message = FAULTS[fault]
    with pytest.raises(ShapeError, match=message):
        make()
