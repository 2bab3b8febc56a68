"""`GridComm`: one communicator made of two, for ranks in rows and columns without a common process group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from distplb.comm.agreement import agree
from distplb.comm.base import Comm, Message, Round
from distplb.errors import DisagreementError, DistplbError, LostRanksError

__all__ = ["GridComm"]


class GridComm:
    """The ranks of a device mesh with two axes: EP groups that hold copies of the same experts.

    Each collective runs in every row and then in every column, so a plan, normally one header and three collectives,
    takes two headers and six. An exchange begins with its own header, because all ranks must know if a message is
    refused; experts travel along rows or columns as long as each EP group moves its own copy of them.

    Args:
        inner: the EP group of this rank: its row, `mesh["ep"]`.
        outer: the ranks that hold the same experts in the other EP groups: its column, `mesh["edp"]`. Rank i of
            `inner` and o of `outer` is rank o × `inner.size` + i of the grid.

    Raises:
        DistplbError: on every rank of a row or column whose ranks do not form one grid, or if the two communicators
            have their buffers on different devices.
        LostRanksError: from any call; it names ranks of the grid. If one row loses a rank, other rows may name the
            ranks that waited for it.
    """

    def __init__(self, inner: Comm, outer: Comm) -> None:
        if inner.device != outer.device:
            raise DistplbError(
                f"inner has its buffers on {inner.device}, outer on {outer.device}; pass groups of the same backend"
            )
        self._inner, self._outer, self.device = inner, outer, inner.device
        self.rank, self.size = outer.rank * inner.size + inner.rank, outer.size * inner.size
        self._lost: LostRanksError | None = None
        self._check()

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Sum over rows, then over columns."""
        for line in (self._inner, self._outer):
            with self._named(line):
                line.all_reduce_sum(tensor)

    def all_reduce_min(self, tensor: Tensor) -> None:
        """Take the minimum over rows, then over columns."""
        for line in (self._inner, self._outer):
            with self._named(line):
                line.all_reduce_min(tensor)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Copy the root's values along its row, then along all columns."""
        row, column = divmod(root, self._inner.size)
        if row == self._outer.rank:
            with self._named(self._inner):
                self._inner.broadcast(tensor, column)
        with self._named(self._outer):
            self._outer.broadcast(tensor, row)

    def connect(self, peers: Sequence[int]) -> None:
        """Connect along the row, then along the column; peers in neither are refused only by `exchange`."""
        places = [self._place(peer) for peer in peers]
        for axis, line in enumerate((self._inner, self._outer)):
            with self._named(line):
                line.connect([number for place in places if (number := place[axis]) is not None])

    def exchange(self, rounds: Sequence[Round]) -> None:
        """Exchange messages along rows, then along columns.

        Raises:
            DistplbError: on every rank, before anything is sent, if one has a message for a rank in neither its row nor
                its column.
        """
        peers = {peer for one in rounds for messages in one for _, peer in messages}
        far = sorted(peer for peer in peers if self._place(peer) == (None, None))
        agree(self, {}, self._diagonal(far) if far else None)
        for line, axis in ((self._inner, 0), (self._outer, 1)):
            with self._named(line):
                line.exchange(
                    [(list(self._along(axis, sends)), list(self._along(axis, receives))) for sends, receives in rounds]
                )

    def _check(self) -> None:
        """Check that rows and columns form one grid; rows agree again last, on what only one column has found."""
        inner, outer, refusal = self._inner, self._outer, None
        for line, fields in (
            (inner, {"the row in the grid (outer.rank)": outer.rank, "the number of rows (outer.size)": outer.size}),
            (outer, {"the column in the grid (inner.rank)": inner.rank, "the row's ranks (inner.size)": inner.size}),
            (inner, {}),
        ):
            try:
                with self._named(line):
                    agree(line, fields, refusal)
            except LostRanksError:
                raise
            except DisagreementError as difference:
                refusal = DistplbError(
                    f"inner and outer are not the rows and columns of one grid ({difference}); pass two axes of one "
                    "mesh, as in GridComm(TorchComm(mesh['ep']), TorchComm(mesh['edp']))"
                )
            except DistplbError as error:
                refusal = refusal or error
        if refusal is not None:
            raise refusal

    def _place(self, peer: int) -> tuple[int | None, int | None]:
        """A peer's index in this rank's row, or else in its column; None for both if it is in neither."""
        row, column = divmod(peer, self._inner.size)
        if row == self._outer.rank:
            return column, None
        return None, row if column == self._inner.rank else None

    def _along(self, axis: int, messages: Sequence[Message]) -> Iterator[Message]:
        """The messages that go along the row (0) or the column (1), with the peer's index in it."""
        for tensor, peer in messages:
            number = self._place(peer)[axis]
            if number is not None:
                yield tensor, number

    def _diagonal(self, far: Sequence[int]) -> DistplbError:
        return DistplbError(
            f"rank {self.rank} of the {self._outer.size} × {self._inner.size} grid has messages to or from "
            f"rank{'s' * (len(far) > 1)} {', '.join(map(str, far))}, in neither its row nor its column; if experts are "
            "sharded over EP groups, pass a communicator of all ranks, such as TorchComm(dist.new_group(ranks))"
        )

    @contextmanager
    def _named(self, line: Comm) -> Iterator[None]:
        """Report lost ranks of a row or column as ranks of the grid."""
        if self._lost is not None:
            raise self._lost
        try:
            yield
        except LostRanksError as lost:
            size, row, column = self._inner.size, self._outer.rank, self._inner.rank
            missing = [row * size + rank if line is self._inner else rank * size + column for rank in lost.missing]
            where = f"row {row}" if line is self._inner else f"column {column}"
            self._lost = LostRanksError(missing, f"in {where} of the grid: {lost.why}", lost.stage)
            raise self._lost from lost
