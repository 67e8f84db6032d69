"""Candidates for an MI: streams that are concatenated or added, and the cost of adding W."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from mi.find.records import Meeting, Product
from mi.find.values import get_sources

RANK = 16  # of the low-rank form, or the smallest size where that is less


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A place where two streams are combined by an affine map without a product.

    The costs are those of adding W to the existing affine map: for the full W [m, n, k], for
    factors of rank r, and for a diagonal W, i.e. (zᵀa) ⊙ (Vx) with a [m, k]. A multiplication and
    an addition count as two FLOPs.

    Attributes:
      kind: 'concatenation' or 'sum'.
      x, z: the streams of each side, separated by commas.
      n, m, k: numbers of features in x, z and the result.
      rank: r, the rank of the factors.
      path: the names of the enclosing modules.
      source: the source line.
      times: number of executions per call, or None if it depends on a while loop.
      params: number of parameters of the forms 'full', 'low rank' and 'diagonal'.
      flops: FLOPs of these forms per call, counting one iteration of a while loop.
    """

    kind: str
    x: str
    z: str
    n: int
    m: int
    k: int
    rank: int
    path: str
    source: str
    times: int | None
    params: dict[str, int]
    flops: dict[str, int]


def list_candidates(
    meetings: Iterable[Meeting], products: Iterable[Product], names: dict[int, str]
) -> list[Candidate]:
    """List the meetings of arrays that are not multiplied by any recorded product.

    Args:
      meetings, products: records of the interpreter.
      names: the names of the streams in each bit mask.
    """
    # Pairs of arrays that a product multiplies, directly or after an affine map; and a product with
    # its own factors, as in zᵀWx + zᵀU.
    multiplied = set()
    for product in products:
        lefts, rights = get_sources(product.left), get_sources(product.right)
        for left in lefts:
            multiplied |= {frozenset((left.root, right.root)) for right in rights}
        for source in (*lefts, *rights):
            multiplied |= {frozenset((root, source.root)) for root in product.roots}
    meetings_by_place: dict[object, list[Meeting]] = {}
    for meeting in meetings:
        pair = frozenset((meeting.left.root, meeting.right.root))
        if pair in multiplied:
            continue
        meetings_by_place.setdefault((pair, meeting.scope.path, meeting.source), []).append(meeting)
    return [_make_candidate(group, names) for group in meetings_by_place.values()]


def _make_candidate(group: Sequence[Meeting], names: dict[int, str]) -> Candidate:
    """Return one candidate for all meetings of the same arrays, such as those in four gates."""
    meeting = group[0]
    n, m = meeting.left.size * meeting.window, meeting.right.size * meeting.window
    k = sum(other.features for other in group)
    num_rows = math.prod(meeting.shape) // max(1, meeting.features)
    rank = min(RANK, n, m, k)
    params = {'full': m * n * k, 'low rank': rank * (m + n + k), 'diagonal': m * k}
    row_flops = {
        'full': 2 * m * n * k + 2 * n * k,
        'low rank': 2 * params['low rank'] + rank,
        'diagonal': 2 * m * k + 2 * k,
    }
    flops = {form: meeting.scope.times * num_rows * cost for form, cost in row_flops.items()}
    return Candidate(
        kind=meeting.kind,
        x=names[meeting.left.streams],
        z=names[meeting.right.streams],
        n=n,
        m=m,
        k=k,
        rank=rank,
        path=meeting.scope.path,
        source=meeting.source,
        times=meeting.scope.known_times,
        params=params,
        flops=flops,
    )
