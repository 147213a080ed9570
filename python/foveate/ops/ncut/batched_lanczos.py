"""Top eigenpairs of many normalized affinities at once, in float64 tensor operations.

Block Lanczos of width 4 on M = D^-1/2 W D^-1/2 with the trivial pair deflated, full
reorthogonalisation and thick restart. All images of a batch take the same steps; one that has
converged keeps its result while the others go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

WIDTH = 4  # columns of a block
LOOK_EVERY = 4  # passes between two looks at the Ritz values
_DENSE = 64  # tokens up to which the whole matrix is diagonalised
_FLOOR = 4 * torch.finfo(torch.float64).eps  # least residual that is believed
_EXACT = 1e-13  # residual at which there is nothing left to gain
_DEAD = 1e-12  # norm below which a column has left the search space
_ABSENT = -2.0  # below every eigenvalue of M
DEGENERATE = 1e-9  # gap at or below which a vector is not determined
_CLASSES = 3  # equal rows: isolated tokens, rows without a bit, full rows


class Graph(NamedTuple):
    """Affinities W of b images of at most n tokens; an image with fewer is padded."""

    apply: Callable[[torch.Tensor], torch.Tensor]  # x [b, w, n] -> W x [b, w, n], contiguous
    degree: torch.Tensor  # [b, n] float64, row sums of W; 1 at padding
    inside: torch.Tensor  # [b, n] bool, False at padding
    tokens: torch.Tensor  # [b] int64
    label: torch.Tensor  # [b, n] int64, 0 or the class of equal rows 1.._CLASSES
    class_mu: torch.Tensor  # [b, _CLASSES] eigenvalue of vectors that sum to 0 over the class


class Pairs(NamedTuple):
    """The first eigenpairs of each image, mu descending, without the trivial one."""

    mu: torch.Tensor  # [b, k]
    y: torch.Tensor  # [b, k, n] orthonormal
    residual: torch.Tensor  # [b, k] |M y - mu y|
    gap: torch.Tensor  # [b] smallest difference of neighbours, one further value included
    first_gap: torch.Tensor  # [b] mu_2 - mu_3
    certain_gap: torch.Tensor  # [b] mu_2 - mu_3 less the error of mu_3
    passes: torch.Tensor  # [b] int64


class _Ritz(NamedTuple):
    mu: torch.Tensor  # [b, w] descending; _ABSENT where there is none
    y: torch.Tensor  # [b, w, n]
    residual: torch.Tensor  # [b, w]


def solve(graph: Graph, k: int, tol: float, max_iter: int) -> Pairs:
    """The k largest eigenpairs of each image's M, the trivial one excluded.

    Args:
        graph: the affinities.
        k: pairs wanted, at most tokens - 2 of every image.
        tol: residual wanted.
        max_iter: most passes over the affinity.
    """
    scale = graph.degree.rsqrt() * graph.inside  # [b, n]
    trivial = graph.degree.sqrt() * graph.inside
    trivial = trivial / torch.linalg.vector_norm(trivial, dim=1, keepdim=True)

    def operator(y: torch.Tensor) -> torch.Tensor:
        return graph.apply((y * scale[:, None]).contiguous()) * scale[:, None]

    if graph.degree.shape[1] <= _DENSE:
        found = _dense(operator, graph, trivial, k)
        passes = torch.ones_like(graph.tokens)
        return _finish(operator, _merge(graph, found, k, classes=False), passes)
    search = _Search(operator, graph, scale, k, tol, max_iter)
    found, passes = search.run(trivial[:, None], k + 1, None)
    found, passes = search.look_for_missed(trivial[:, None], found, passes)
    return _finish(operator, _merge(graph, found, k, classes=True), passes)


def _dense(
    operator: Callable[[torch.Tensor], torch.Tensor], graph: Graph, trivial: torch.Tensor, k: int
) -> _Ritz:
    b, n = trivial.shape
    eye = torch.eye(n, dtype=torch.float64, device=trivial.device)
    matrix = operator(eye.expand(b, n, n))
    matrix = (matrix + matrix.mT) / 2
    matrix = matrix - 4 * trivial[:, :, None] * trivial[:, None, :]
    matrix = matrix - 4 * torch.diag_embed((~graph.inside).double())
    mu, vectors = torch.linalg.eigh(matrix)
    mu, y = mu.flip(1)[:, : k + 1], vectors.flip(2)[:, :, : k + 1].mT.contiguous()
    return _Ritz(mu, y, torch.zeros_like(mu))


class _Merged(NamedTuple):
    mu: torch.Tensor  # [b, k + 1] descending
    y: torch.Tensor  # [b, k, n]
    last_residual: torch.Tensor  # [b, 2] of the second and the last value


def _order(graph: Graph, found: _Ritz, count: int) -> tuple[torch.Tensor, ...]:
    """Ritz values and the exact values of the classes in one list: mu, residual, source, number."""
    b = found.mu.shape[0]
    each = torch.arange(count, device=found.mu.device)
    mus, residuals = [found.mu], [found.residual]
    sources, numbers = [torch.zeros_like(found.mu, dtype=torch.int64)], []
    numbers.append(torch.arange(found.mu.shape[1], device=found.mu.device).expand(b, -1))
    for c in range(1, _CLASSES + 1):
        copies = (graph.label == c).sum(1) - 1
        mu = torch.where(each < copies[:, None], graph.class_mu[:, c - 1 : c], _ABSENT)
        mus.append(mu)
        residuals.append(torch.zeros_like(mu))
        sources.append(torch.full_like(mu, c, dtype=torch.int64))
        numbers.append(each.expand(b, -1))
    mu, order = torch.sort(torch.cat(mus, 1), dim=1, descending=True, stable=True)
    order = order[:, :count]
    return (
        mu[:, :count],
        torch.cat(residuals, 1).gather(1, order),
        torch.cat(sources, 1).gather(1, order),
        torch.cat(numbers, 1).gather(1, order),
    )


def _merge(graph: Graph, found: _Ritz, k: int, *, classes: bool) -> _Merged:
    if not classes:
        return _Merged(found.mu, found.y[:, :k], found.residual[:, [1, -1]])
    mu, residual, source, number = _order(graph, found, k + 1)
    columns = number[:, :k, None].clamp(max=found.y.shape[1] - 1).expand(-1, -1, found.y.shape[2])
    y = found.y.gather(1, columns)
    for c in range(1, _CLASSES + 1):
        contrast = _contrasts(graph.label == c, number[:, :k])
        y = torch.where((source[:, :k] == c)[:, :, None], contrast, y)
    return _Merged(mu, y, residual[:, [1, -1]])


def _contrasts(members: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Helmert's contrasts over the members [b, n], by number [b, k]: [b, k, n], orthonormal."""
    rank = torch.cumsum(members, 1)[:, None] - 1  # [b, 1, n]
    j = number[:, :, None]
    length = ((j + 1) * (j + 2)).double().rsqrt()
    value = torch.where(rank <= j, length, torch.where(rank == j + 1, -(j + 1) * length, 0.0))
    return torch.where(members[:, None], value, 0.0)


def _finish(
    operator: Callable[[torch.Tensor], torch.Tensor],
    merged: _Merged,
    passes: torch.Tensor,
) -> Pairs:
    mu, y = merged.mu[:, :-1], merged.y
    defect = (
        torch.cat([operator(y[:, i : i + WIDTH]) for i in range(0, y.shape[1], WIDTH)], 1)
        - y * mu[:, :, None]
    )
    residual = torch.linalg.vector_norm(defect, dim=2)
    first_gap = mu[:, 0] - merged.mu[:, 1]
    second = residual[:, 1] if residual.shape[1] > 1 else merged.last_residual[:, 0]
    return Pairs(
        mu,
        y,
        residual,
        (merged.mu[:, :-1] - merged.mu[:, 1:]).min(1).values.clamp_min(0.0),
        first_gap.clamp_min(0.0),
        first_gap - torch.maximum(second, second.new_tensor(_FLOOR)),
        passes,
    )


def uncertain_tokens(
    graph: Graph,
    x: torch.Tensor,
    residual: torch.Tensor,
    first_gap: torch.Tensor,
    certain_gap: torch.Tensor,
) -> torch.Tensor:
    """How many tokens' side of mean(x) is not certified, `[b]` int64 (Davis and Kahan, 1970).

    Args:
        graph: the affinities.
        x: `[b, n]` D^-1/2 y for a unit y.
        residual: `[b]` of y.
        first_gap: `[b]` mu_2 - mu_3.
        certain_gap: `[b]` the same, less the residual of the third vector.
    """
    delta = 2**0.5 * residual.clamp_min(_FLOOR) / certain_gap  # [b]
    root = graph.degree.rsqrt() * graph.inside
    spread = torch.linalg.vector_norm(root, dim=1) / graph.tokens  # [b]
    distance = (x - mean(graph, x)[:, None]).abs()
    doubtful = distance <= delta[:, None] * (root + spread[:, None])
    lost = (certain_gap <= 0) | (first_gap <= DEGENERATE)
    return torch.where(lost, graph.tokens, (doubtful & graph.inside).sum(1))


def mean(graph: Graph, x: torch.Tensor) -> torch.Tensor:
    """Plain mean over the tokens, `[b, n]` -> `[b]`."""
    return (x * graph.inside).sum(1) / graph.tokens


def first_largest(score: torch.Tensor) -> torch.Tensor:
    """Index of the largest `score` `[b, n]` >= 0; within 1e-9 of it the lowest index wins."""
    near = score >= score.amax(1, keepdim=True) * (1 - 1e-9)
    return near.to(torch.uint8).argmax(1)


def signed(x: torch.Tensor) -> torch.Tensor:
    """x `[b, k, n]` with the sign that makes its largest entry in magnitude positive."""
    rows = x.reshape(-1, x.shape[2])
    at = first_largest(rows.abs())[:, None]
    sign = torch.where(rows.gather(1, at) < 0, -1.0, 1.0).to(x.dtype)
    return (rows * sign).view(x.shape)


def hash_columns(n: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """`[count, n]` numbers in [-1, 1): splitmix64 of the token and the column."""
    token = torch.arange(n, device=device)
    column = torch.arange(first, first + count, device=device)
    z = (column[:, None] << 32) + token + 1
    z = z * -7046029254386353131  # 0x9E3779B97F4A7C15
    z = (z ^ _shift(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    z = z ^ _shift(z, 31)
    return (z >> 11).double() * 2.0**-52


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


class _Search:
    """One Krylov search in the class-constant vectors orthogonal to what is known."""

    def __init__(
        self,
        operator: Callable[[torch.Tensor], torch.Tensor],
        graph: Graph,
        scale: torch.Tensor,
        k: int,
        tol: float,
        max_iter: int,
    ) -> None:
        self.operator = operator
        self.graph = graph
        self.scale = scale
        self.k = k
        self.tol = tol
        self.max_iter = max_iter
        members = graph.label[:, None] == torch.arange(
            1, _CLASSES + 1, device=graph.label.device
        ).view(1, -1, 1)
        sizes = members.sum(2)  # [b, _CLASSES]
        self.indicators = members.double() / sizes.clamp_min(1).double().sqrt()[:, :, None]
        self.single = ((graph.label == 0) & graph.inside).double()
        self.dimension = graph.tokens - sizes.sum(1) + (sizes > 0).sum(1) - 1

    def averaged(self, y: torch.Tensor) -> torch.Tensor:
        """y [b, w, n] with its mean over each class in place of the members' values."""
        return y * self.single[:, None] + torch.bmm(
            torch.bmm(y, self.indicators.mT), self.indicators
        )

    def fresh(self, known: torch.Tensor, step: int) -> torch.Tensor:
        """Hash columns of a step, orthogonal to the rows of `known` [b, m, n]."""
        columns = hash_columns(known.shape[2], WIDTH * step, WIDTH, known.device)
        block = self.averaged(columns.expand(known.shape[0], -1, -1) * self.graph.inside[:, None])
        block = block / torch.linalg.vector_norm(block, dim=2, keepdim=True).clamp_min(1e-300)
        return _orthonormal(block, known, dead=1e-9)[0]

    def run(
        self, known: torch.Tensor, want: int, stop_below: torch.Tensor | None
    ) -> tuple[_Ritz, torch.Tensor]:
        """The `want` largest pairs orthogonal to `known` [b, q, n], and the passes they took.

        With `stop_below` [b] it ends for an image as soon as no eigenvalue above that can exist, or
        the first pair has converged.
        """
        b, q, n = known.shape
        cap = 64 + 4 * max(want - 1, 1)
        dimension = self.dimension - (q - 1)
        basis = known.new_zeros(b, q + cap + WIDTH, n)  # rows: known, then the Krylov basis
        small = known.new_zeros(b, cap + WIDTH, cap + WIDTH)
        basis[:, :q] = known
        basis[:, q : q + WIDTH] = self.fresh(known, 1024 * q)
        done = dimension <= 0
        passes = torch.zeros_like(self.graph.tokens)
        result = _Ritz(
            known.new_full((b, want), _ABSENT),
            known.new_zeros(b, want, n),
            known.new_zeros(b, want),
        )
        m = 0  # columns multiplied so far
        for step in range(1, self.max_iter + 1):
            at = q + m
            image = self.averaged(self.operator(basis[:, at : at + WIDTH]))
            block, against, coupling = _orthonormal_with(image, basis[:, : at + WIDTH])
            small[:, : m + WIDTH, m : m + WIDTH] = against[:, :, q:].mT
            small[:, m : m + WIDTH, : m + WIDTH] = against[:, :, q:]
            m += WIDTH
            basis[:, q + m : q + m + WIDTH] = block
            passes = passes + (~done).long()
            if step % LOOK_EVERY and m + WIDTH <= cap and step < self.max_iter:
                continue
            ritz, values, rotation, alive = self.ritz(
                basis[:, q : q + m], small[:, :m, :m], coupling, want
            )
            result = _Ritz(
                *(
                    torch.where(done.view(-1, *[1] * (new.ndim - 1)), old, new)
                    for old, new in zip(result, ritz, strict=True)
                )
            )
            done = done | self.finished(ritz, alive, dimension, want, stop_below)
            if bool(done.all()):
                break
            if m + WIDTH > cap:
                keep = min(want + 3, m - WIDTH)
                kept = torch.bmm(rotation[:, :, :keep].mT, basis[:, q : q + m])
                following = basis[:, q + m : q + m + WIDTH].clone()
                basis[:, q : q + keep] = kept
                basis[:, q + keep : q + keep + WIDTH] = following
                small.zero_()
                small[:, :keep, :keep] = torch.diag_embed(values[:, :keep])
                m = keep
            dead = torch.linalg.vector_norm(basis[:, q + m : q + m + WIDTH], dim=2) == 0
            if bool((dead.any(1) & ~done).any()):
                known_now = basis[:, : q + m + WIDTH]
                draw = self.fresh(known_now, 1024 * q + step)
                basis[:, q + m : q + m + WIDTH] = torch.where(
                    dead[:, :, None], draw, basis[:, q + m : q + m + WIDTH]
                )
        return result, passes

    def ritz(
        self, basis: torch.Tensor, small: torch.Tensor, coupling: torch.Tensor, want: int
    ) -> tuple[_Ritz, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ritz pairs; all values [b, m], the rotation [b, m, m], how many columns are alive."""
        m = small.shape[1]
        alive = torch.linalg.vector_norm(basis, dim=2) > 0  # [b, m]
        shifted = (small + small.mT) / 2 + torch.diag_embed(torch.where(alive, 0.0, _ABSENT))
        values, vectors = torch.linalg.eigh(shifted)
        values, rotation = values.flip(1), vectors.flip(2)
        last = rotation[:, m - WIDTH :, :want]  # [b, WIDTH, want]
        residual = torch.linalg.vector_norm(torch.bmm(coupling, last), dim=1)
        mu, y = values[:, :want], torch.bmm(rotation[:, :, :want].mT, basis)
        short = want - mu.shape[1]
        if short > 0:
            mu = torch.nn.functional.pad(mu, (0, short), value=_ABSENT)
            residual = torch.nn.functional.pad(residual, (0, short))
            y = torch.nn.functional.pad(y, (0, 0, 0, short))
        return _Ritz(mu, y, residual), values, rotation, alive.sum(1)

    def finished(
        self,
        ritz: _Ritz,
        alive: torch.Tensor,
        dimension: torch.Tensor,
        want: int,
        stop_below: torch.Tensor | None,
    ) -> torch.Tensor:
        """Which images need no further pass, [b] bool."""
        whole = alive >= dimension  # nothing is left to search
        if stop_below is not None:
            # The residual bounds the distance to some eigenvalue: it must have settled before it
            # tells that none is above.
            below = ritz.mu[:, 0] + 10 * ritz.residual[:, 0] < stop_below
            return whole | ((alive >= 1) & (below | (ritz.residual[:, 0] <= _EXACT)))
        graph, k = self.graph, self.k
        mu, residual, source, _ = _order(graph, ritz, k + 1)
        wanted = residual[:, :k].amax(1)
        gap = (mu[:, :-1] - mu[:, 1:]).amin(1)
        first_gap = mu[:, 0] - mu[:, 1]
        x = _merge(graph, ritz, 1, classes=True).y[:, 0] * self.scale
        doubt = uncertain_tokens(
            graph,
            x,
            residual[:, 0],
            first_gap,
            first_gap - residual[:, 1].clamp_min(_FLOOR),
        )
        # A Ritz value that lost its place to a class's value must be sure to stay below it.
        used = (source == 0).sum(1, keepdim=True)
        following = used.clamp(max=want - 1)
        beneath = mu[:, k] - ritz.mu.gather(1, following)[:, 0]
        unsure = ritz.residual.gather(1, following)[:, 0]
        settled_order = (used[:, 0] >= want) | (unsure <= 0.1 * beneath) | (unsure <= _EXACT)
        settled = (doubt == 0) & (residual[:, k] <= 0.1 * gap) & (wanted <= self.tol)
        exact = residual.amax(1) <= _EXACT
        enough = settled_order & (alive >= want) & ((settled & (first_gap > DEGENERATE)) | exact)
        return whole | enough

    def look_for_missed(
        self, trivial: torch.Tensor, found: _Ritz, passes: torch.Tensor
    ) -> tuple[_Ritz, torch.Tensor]:
        """`found` with the copies of multiple eigenvalues that one block of columns cannot see."""
        want = found.mu.shape[1]
        for _ in range(want):
            close = found.mu[:, :-1] - found.mu[:, 1:] <= DEGENERATE
            runs = torch.zeros_like(passes)
            longest = torch.zeros_like(passes)
            for i in range(close.shape[1]):
                runs = torch.where(close[:, i], runs + 1, 0)
                longest = torch.maximum(longest, runs)
            suspect = longest >= WIDTH - 1
            if self.k > WIDTH - 1:
                suspect = torch.ones_like(suspect)
            if not bool(suspect.any()):
                break
            limit = torch.where(suspect, found.mu[:, -1], 2.0)
            known = torch.cat([trivial, found.y], 1)
            extra, more = self.run(known, 1, limit)
            passes = passes + torch.where(suspect, more, 0)
            missed = suspect & (extra.mu[:, 0] > found.mu[:, -1] + DEGENERATE)
            if not bool(missed.any()):
                break
            mu = torch.cat([found.mu, torch.where(missed[:, None], extra.mu, _ABSENT)], 1)
            mu, order = torch.sort(mu, dim=1, descending=True, stable=True)
            order = order[:, :want]
            y = torch.cat([found.y, extra.y], 1)
            residual = torch.cat([found.residual, extra.residual], 1)
            found = _Ritz(
                mu[:, :want],
                y.gather(1, order[:, :, None].expand(-1, -1, y.shape[2])),
                residual.gather(1, order),
            )
        return found, passes


def _project(block: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`block` [b, w, n] less its part in the rows of `known` [b, m, n]; the coefficients."""
    coefficients = torch.bmm(block, known.mT)
    block = torch.baddbmm(block, coefficients, known, alpha=-1)
    again = torch.bmm(block, known.mT)
    return torch.baddbmm(block, again, known, alpha=-1), coefficients + again


def _gram_schmidt(block: torch.Tensor, dead: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal rows (zero where a row has no part of its own) and R: block = R^T rows."""
    rows: list[torch.Tensor] = []
    coupling = block.new_zeros(block.shape[0], block.shape[1], block.shape[1])
    for c in range(block.shape[1]):
        row = block[:, c : c + 1]
        if rows:
            before = torch.cat(rows, 1)
            row, coefficients = _project(row, before)
            coupling[:, :c, c] = coefficients[:, 0]
        norm = torch.linalg.vector_norm(row, dim=2, keepdim=True)
        lives = norm > dead
        coupling[:, c, c] = torch.where(lives, norm, 0.0)[:, 0, 0]
        rows.append(torch.where(lives, row / torch.where(lives, norm, 1.0), 0.0))
    return torch.cat(rows, 1), coupling


def _orthonormal_with(
    block: torch.Tensor, known: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orthonormal rows for `block` less `known`; its coefficients in `known`, and R."""
    block, against = _project(block, known)
    rows, coupling = _orthonormal(block, known, dead=_DEAD)
    return rows, against, coupling


def _orthonormal(
    block: torch.Tensor, known: torch.Tensor, dead: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows orthonormal among themselves and to `known`, and R with block = R^T rows."""
    rows, coupling = _gram_schmidt(block, dead)
    # Normalising a short row magnifies its rounding along `known`: project the unit rows again.
    again, second = _gram_schmidt(_project(rows, known)[0], 0.5)
    return again, torch.bmm(second, coupling)
