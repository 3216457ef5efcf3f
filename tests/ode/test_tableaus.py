"""The digits of every explicit method, checked by what they must satisfy."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ctorch.ode.adams_coefficients import MAX_ADAMS_ORDER, adams_bashforth, adams_moulton
from ctorch.ode.tableaus import TABLEAUS, Tableau, quartic_from_mid

from .rooted_trees import density, stage_weights, trees

TOLERANCE = 1e-12
EMBEDDED_ORDER = {
    "adaptive_heun": 1,
    "fehlberg2": 1,
    "bosh3": 2,
    "dopri5": 4,
    "tsit5": 4,
    "dopri8": 7,
    "vern7": 6,
}
QUARTIC_ORDER = {
    "adaptive_heun": 1,
    "fehlberg2": 1,
    "bosh3": 1,
    "dopri5": 4,
    "tsit5": 4,
    "dopri8": 4,
}
every_method = pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=lambda t: t.name)
every_adaptive = pytest.mark.parametrize(
    "tableau", [t for t in TABLEAUS.values() if t.adaptive], ids=lambda t: t.name
)


def stage_matrix(tableau: Tableau) -> NDArray[np.longdouble]:
    """Weights of all stages, the interpolant's extra ones too, as a square matrix."""
    rows = (*tableau.a, *tableau.extra_a)
    matrix = np.zeros((len(rows), len(rows)), np.longdouble)
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = row
    return matrix


def defects(
    weights: NDArray[np.floating], a: NDArray[np.floating], nodes: int, theta: float = 1.0
) -> NDArray[np.floating]:
    """What is missing to each order condition of the trees with that many nodes."""
    count = len(weights)
    return np.array(
        [
            stage_weights(tree, a)[:count] @ weights - theta**nodes / density(tree)
            for tree in trees(nodes)
        ],
        dtype=np.float64,
    )


def satisfied_order(
    weights: NDArray[np.floating], a: NDArray[np.floating], theta: float = 1.0
) -> int:
    """The number of nodes up to which all conditions hold, at most 8."""
    for nodes in range(1, 9):
        if np.abs(defects(weights, a, nodes, theta)).max() > TOLERANCE:
            return nodes - 1
    return 8


def polynomials(dense: tuple[tuple[float, ...], ...], theta: float) -> NDArray[np.longdouble]:
    matrix = np.array(dense, np.longdouble)
    return matrix @ np.longdouble(theta) ** np.arange(1, matrix.shape[1] + 1)


def test_there_are_as_many_rooted_trees_as_cayley_counted() -> None:
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]
    assert all(len(set(trees(n))) == len(trees(n)) for n in range(1, 9))


@every_method
def test_shapes_fit_together(tableau: Tableau) -> None:
    stages, extra = tableau.stages, len(tableau.extra_c)
    assert len(tableau.b) == len(tableau.a) == stages
    assert [len(row) for row in tableau.a] == list(range(stages))
    assert [len(row) for row in tableau.extra_a] == list(range(stages, stages + extra))
    assert len(tableau.dense) == stages + extra
    assert len({len(row) for row in tableau.dense}) == 1
    assert tableau.e is None or len(tableau.e) == stages
    assert tableau.mid is None or len(tableau.mid) == stages


@every_method
def test_abscissae_are_the_row_sums(tableau: Tableau) -> None:
    abscissae = np.array((*tableau.c, *tableau.extra_c))
    assert np.abs(stage_matrix(tableau).sum(1) - abscissae).max() < 1e-13


@every_method
def test_the_order_is_what_is_said_and_no_higher(tableau: Tableau) -> None:
    assert satisfied_order(np.array(tableau.b), stage_matrix(tableau)) == tableau.order


@every_adaptive
def test_the_embedded_solution_has_the_order_below(tableau: Tableau) -> None:
    embedded = np.array(tableau.b) - np.array(tableau.e)
    assert satisfied_order(embedded, stage_matrix(tableau)) == EMBEDDED_ORDER[tableau.name]


@every_adaptive
def test_the_last_stage_is_the_slope_at_the_end(tableau: Tableau) -> None:
    assert tableau.c[-1] == 1.0
    assert tableau.b[-1] == 0.0
    assert tableau.a[-1] == tableau.b[:-1]


@pytest.mark.parametrize("name", ["dopri5", "dopri8", "vern7"])
def test_stages_after_the_second_have_order_two_at_least(name: str) -> None:
    tableau = TABLEAUS[name]
    a, c = stage_matrix(tableau), np.array((*tableau.c, *tableau.extra_c))
    assert np.abs((a @ c - c**2 / 2)[2:]).max() < 1e-13


@every_method
@settings(max_examples=10, deadline=None)
@given(theta=st.floats(0.0, 1.0))
def test_the_interpolant_has_its_order_everywhere(tableau: Tableau, theta: float) -> None:
    a, weights = stage_matrix(tableau), polynomials(tableau.dense, theta)
    for nodes in range(1, tableau.dense_order + 1):
        assert np.abs(defects(weights, a, nodes, theta)).max() < TOLERANCE


@every_method
def test_the_interpolant_has_no_higher_order_than_said(tableau: Tableau) -> None:
    weights = polynomials(tableau.dense, 0.4)
    assert satisfied_order(weights, stage_matrix(tableau), 0.4) == tableau.dense_order


@every_method
def test_the_interpolant_meets_the_step_in_value_and_slope(tableau: Tableau) -> None:
    dense = np.array(tableau.dense, np.longdouble)
    first, last = np.zeros(len(dense)), np.zeros(len(dense))
    first[0] = 1.0
    last[tableau.stages - 1 if tableau.adaptive else tableau.stages] = 1.0
    new_state = np.zeros(len(dense))
    new_state[: tableau.stages] = tableau.b
    assert np.abs(dense.sum(1) - new_state).max() < 2e-12
    assert np.abs(dense[:, 0] - first).max() < 1e-14
    assert np.abs(dense @ np.arange(1, dense.shape[1] + 1) - last).max() < 1e-10


@pytest.mark.parametrize("name", QUARTIC_ORDER)
def test_the_quartic_passes_the_midpoint_and_has_its_order(name: str) -> None:
    tableau = TABLEAUS[name]
    quartic = quartic_from_mid(tableau)
    assert np.abs(polynomials(quartic, 0.5) - np.array(tableau.mid)).max() < 1e-14
    order = satisfied_order(polynomials(quartic, 0.7), stage_matrix(tableau), 0.7)
    assert order == QUARTIC_ORDER[name]


def test_the_quartic_of_a_method_without_midpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="rk4"):
        quartic_from_mid(TABLEAUS["rk4"])


def nonzero_digits() -> list[tuple[str, str, int, int]]:
    """Where each number that is written down, not computed, sits: method, field, row, column."""
    places = []
    for name, tableau in TABLEAUS.items():
        for field in ("a", "extra_a", "dense"):
            rows = getattr(tableau, field)
            places += [
                (name, field, i, j) for i, row in enumerate(rows) for j, x in enumerate(row) if x
            ]
        places += [(name, "b", 0, j) for j, x in enumerate(tableau.b) if x]
        places += [(name, "e", 0, j) for j, x in enumerate(tableau.e or ()) if x]
    return places


def check_everything(tableau: Tableau) -> None:
    test_abscissae_are_the_row_sums(tableau)
    test_the_order_is_what_is_said_and_no_higher(tableau)
    test_the_interpolant_meets_the_step_in_value_and_slope(tableau)
    if tableau.adaptive:
        test_the_embedded_solution_has_the_order_below(tableau)


@settings(max_examples=60, deadline=None)
@given(place=st.sampled_from(nonzero_digits()), size=st.sampled_from([1e-9, -1e-6, 1e-3]))
def test_a_wrong_digit_is_noticed(place: tuple[str, str, int, int], size: float) -> None:
    name, field, i, j = place
    tableau = TABLEAUS[name]
    value = getattr(tableau, field)
    if field in ("b", "e"):
        planted = (*value[:j], value[j] + size, *value[j + 1 :])
    else:
        row = (*value[i][:j], value[i][j] + size, *value[i][j + 1 :])
        planted = (*value[:i], row, *value[i + 1 :])
    wrong = replace(tableau, **{field: planted})
    with pytest.raises(AssertionError):
        check_everything(wrong)


@pytest.mark.parametrize("order", range(1, MAX_ADAMS_ORDER + 1))
def test_adams_methods_integrate_polynomials_of_their_order_exactly(order: int) -> None:
    for weights, newest in ((adams_bashforth(order), 0), (adams_moulton(order), 1)):
        assert len(weights) == order
        for power in range(order):
            terms = [Fraction(w) * (newest - j) ** power for j, w in enumerate(weights)]
            size = float(max(map(abs, terms)))
            assert abs(float(sum(terms) - Fraction(1, power + 1))) < 1e-14 * max(1.0, size)


def test_adams_methods_of_low_order_are_the_classical_ones() -> None:
    assert adams_bashforth(2) == (1.5, -0.5)
    assert adams_bashforth(4) == (55 / 24, -59 / 24, 37 / 24, -9 / 24)
    assert adams_moulton(1) == (1.0,)
    assert adams_moulton(4) == (9 / 24, 19 / 24, -5 / 24, 1 / 24)


@pytest.mark.parametrize("order", [0, 13])
def test_adams_orders_out_of_range_are_refused(order: int) -> None:
    with pytest.raises(ValueError, match="order must be from 1 to 12"):
        adams_bashforth(order)
    with pytest.raises(ValueError, match="order must be from 1 to 12"):
        adams_moulton(order)
