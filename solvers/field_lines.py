"""Lines of a field between two plates of charges, from the plate z = 0 to the plate z = `plate`.

At a charged plate the field's component along the plate is the same on both sides, and its z entry
jumps by the charge there (Gauss's law). So E_z / |E_x|, from the directions on the two sides, gives
the ratio of the fluxes. Where lines start, this ratio decides how many leave on either side. Where
they arrive, the share of the flux that does not pass through the plate ends at the charge; where
there is no charge, all of it passes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from solvers.base import Watch

# Points (x, z) (B, N+1) -> unit vectors along the field.
Directions = Callable[[Tensor], Tensor]

APPROACH = 0.7  # share of the way to a plate that a step may take
ALL = 0.6  # share of the flux that counts as all of it, since networks err by a few tenths
SMALLEST = 0.01  # step size, in units of the margin, that is accepted whatever its error


def leave(direction: Directions, x: Tensor, normal: Tensor, luck: Tensor, radius: float) -> Tensor:
    """Points (B, N+1) on lines that leave the charges `x` (B, N) of the plate z = 0.

    They lie on spheres of the `radius` around the charges, above or below the plate with
    probabilities in proportion to the fluxes there.

    Args:
        direction: of the field; called twice.
        normal: standard normal noise (B, N+1), whose direction gives the point on the sphere.
        luck: (B,), uniform in [0, 1].
        radius: small enough that the field is that of the charge alone, or of a uniform plate.
    """
    offset = radius * torch.nn.functional.normalize(normal)
    offset[:, -1].abs_()
    above = torch.nn.functional.pad(x, (0, 1)) + offset
    below = mirrored(above, 0.0)
    up, down = flux(direction(above)), flux(mirrored(direction(below), 0.0))
    return torch.where((luck * (up + down) < up)[:, None], above, below)


def mirrored(points: Tensor, plate: float) -> Tensor:
    """Points or, for `plate` 0, vectors (B, N+1) mirrored at z = `plate`."""
    return torch.cat([points[:, :-1], 2 * plate - points[:, -1:]], 1)


def flux(directions: Tensor) -> Tensor:
    """Upward flux (B,) through a plate, over the strength of the field along it; 0 if downward."""
    along = torch.linalg.vector_norm(directions[:, :-1], dim=1)
    return directions[:, -1].clamp(min=0) / along.clamp(min=1e-9)


def follow(
    direction: Directions,
    points: Tensor,
    luck: Tensor,
    *,
    plate: float,
    margin: float,
    reach: float = math.inf,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    max_evaluations: int = 10_000,
    watch: Watch | None = None,
    record: Callable[[Tensor], object] | None = None,
) -> tuple[Tensor, int]:
    """Follow lines at unit speed to the charges on which they end.

    The solver is Bogacki and Shampine's of order 3(2), and each line has its own step size. A step
    covers at most the share `APPROACH` of the way to the plate. At the distance `margin` from it, a
    line ends, or passes through the plate.

    Args:
        direction: of the field.
        points: where the lines start, (B, N+1).
        luck: (B,), uniform in [0, 1]: a line ends where the share of it that passes falls below
            this.
        plate: height of the plate on which lines end.
        margin: distance from the plate at which a line counts as arrived.
        reach: distance from the middle between the plates beyond which a line that leads outwards
            is moved at once to where it comes back; see `returned`.
        rtol, atol: a step is accepted where the root mean square of its error is below atol + rtol
            times the root mean square of the point.
        max_evaluations: number of evaluations of `direction` after which lines that have not ended
            are given up.
        watch: called before each step with the evaluations so far and the share of lines that have
            not ended.
        record: called before each step with the points (B, N+1) so far.

    Returns:
        The ends (B, N), nan for lines that are given up, and the number of evaluations.
    """
    dim = points.shape[1]
    places, ends = points.clone(), torch.full_like(points[:, :-1], torch.nan)
    middle = points.new_zeros(dim)
    middle[-1] = plate / 2
    rows, p = torch.arange(len(points), device=points.device), points
    d, evaluations = direction(p), 1
    step, going_on = torch.full_like(luck, margin), torch.ones_like(luck)
    while len(rows) and evaluations + 7 <= max_evaluations:
        if watch:
            watch(evaluations, len(rows) / len(points))
        if record:
            places[rows] = p
            record(places.clone())
        gap, side = (p[:, -1] - plate).abs(), torch.where(p[:, -1] < plate, 1.0, -1.0)
        approach = side * d[:, -1]
        h = torch.where(approach > 0, torch.minimum(step, APPROACH * gap / approach), step)
        new, last, error = bogacki_shampine(direction, p, d, h[:, None])
        evaluations += 3
        allowed = atol * dim**0.5 + rtol * torch.linalg.vector_norm(new, dim=1)
        ratio = torch.linalg.vector_norm(error, dim=1) / allowed
        crosses = (new[:, -1] - plate) * side >= 0
        accepted = ((ratio <= 1) | (h <= SMALLEST * margin)) & ~crosses
        growth = torch.where(crosses, 0.5, 0.9 * ratio.clamp(min=1e-9) ** (-1 / 3))
        step = (h * growth.clamp(0.2, 5)).clamp(min=SMALLEST * margin)
        p, d = (torch.where(accepted[:, None], b, a) for a, b in ((p, new), (d, last)))

        away = p - middle
        leaves = (torch.linalg.vector_norm(away, dim=1) > reach) & ((away * d).sum(1) > 0)
        if leaves.any():
            p[leaves] = middle + returned(away[leaves], d[leaves])
            d[leaves] = direction(p[leaves])
            evaluations += 1
            continue
        # only lines near a charge, and not those that run along the plate to a distant one
        gap, approach = (p[:, -1] - plate).abs(), side * d[:, -1]
        arrived = (gap <= margin) & (gap <= 2 * margin * dim**0.5 * approach)
        if not arrived.any():
            continue
        at, d_in = p[arrived], d[arrived]
        share, behind, d_out = passing(direction, at, plate, margin)
        evaluations += 4
        going_on[arrived] *= share
        ended = going_on < luck
        on_plate = at + d_in / d_in[:, -1:] * (plate - at[:, -1:])
        p[arrived] = torch.where(ended[arrived][:, None], on_plate, behind)
        d[arrived], step[arrived] = d_out, margin
        ends[rows[ended]], places[rows[ended]] = p[ended, :-1], p[ended]
        of_lines = rows, p, d, step, going_on, luck
        rows, p, d, step, going_on, luck = (each[~ended] for each in of_lines)
    return ends, evaluations


def bogacki_shampine(
    direction: Directions, p: Tensor, d: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a step `h` (B, 1) from points `p` with directions `d`; return points, directions, error.

    Source: Bogacki and Shampine, A 3(2) pair of Runge-Kutta formulas (1989).
    """
    second = direction(p + h / 2 * d)
    third = direction(p + 3 / 4 * h * second)
    new = p + h * (2 / 9 * d + 1 / 3 * second + 4 / 9 * third)
    last = direction(new)
    return new, last, h * (-5 / 72 * d + 1 / 12 * second + 1 / 9 * third - 1 / 8 * last)


def passing(
    direction: Directions, points: Tensor, plate: float, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Share (B,) of the flux towards the plate, from the side of `points`, that passes through it.

    The fluxes at the plate are extrapolated linearly from the distances `margin` and 2 `margin`, so
    that where there is no charge the share is 1, with an error of the order of margin squared.

    Returns:
        The share, the points at the distance `margin` behind the plate, and the directions there.
    """
    side = torch.where(points[:, -1:] < plate, 1.0, -1.0)
    onwards = torch.ones_like(points)
    onwards[:, -1:] = side
    at = [torch.cat([points[:, :-1], plate + k * margin * side], 1) for k in (-2, -1, 1, 2)]
    directions = [direction(each) for each in at]
    first, before, after, last = (flux(onwards * each) for each in directions)
    share = (2 * after - last).clamp(min=0) / torch.maximum(2 * before - first, before / 2)
    share = torch.where(share > ALL, 1.0, share.nan_to_num(1.0))
    return share, at[2], directions[2]


def returned(points: Tensor, directions: Tensor) -> Tensor:
    """Where lines of a dipole at 0 that leave `points` (B, N+1) come back to the same distance.

    These are the mirror images of `points` across the plane orthogonal to the dipole's moment m. In
    the direction u from 0 the field is (N+1) (m.u) u - m up to a factor, so that m follows from the
    `directions` e of the field there:

        m = (1 + 1/N) (e.u) u - e    up to a factor.
    """
    n = points.shape[1] - 1
    u = torch.nn.functional.normalize(points)
    moment = (1 + 1 / n) * (directions * u).sum(1, keepdim=True) * u - directions
    moment = torch.nn.functional.normalize(moment)
    return points - 2 * (points * moment).sum(1, keepdim=True) * moment
