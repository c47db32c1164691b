"""Which ranks carry which subdomains and samples. Index arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from apts_mpi.errors import InvalidInput
from apts_mpi.network.partition import part_of, split
from apts_mpi.options import LocalData


@dataclass(frozen=True)
class Teams:
    """Ranks arranged in teams. A team carries some subdomains and their shards of the batch.

    With one rank a subdomain every team has one rank. With fewer ranks a team carries several subdomains; with more,
    or with replicas, its ranks share the samples. The batch is cut into one shard a subdomain, whatever the number
    of ranks: so the iterates do not depend on it.

    Attributes
    ----------
    ranks, subdomains, replicas
        Their numbers; a team has at least ``replicas`` ranks.
    """

    ranks: int
    subdomains: int
    replicas: int

    def __post_init__(self) -> None:
        if self.ranks % self.replicas:
            raise InvalidInput(
                f"replicas: {self.replicas} does not divide the {self.ranks} ranks; give a divisor, or other ranks"
            )

    @property
    def count(self) -> int:
        """Number of teams."""
        return min(self.subdomains, self.ranks // self.replicas)

    def team_of(self, rank: int) -> int:
        """Team of a rank."""
        return part_of(self.ranks, self.count, rank)

    def ranks_of(self, team: int) -> range:
        """Ranks of a team; the first one is its leader."""
        return range(*split(self.ranks, self.count, team))

    def subdomains_of(self, team: int) -> range:
        """Subdomains that a team carries."""
        return range(*split(self.subdomains, self.count, team))

    def shards(self, rank: int, batch_size: int, local_data: LocalData) -> list[tuple[int, int]]:
        """Samples that a rank evaluates, as ranges of the batch: one for each pass through the network.

        With ``shared`` every rank has an even share of the batch in one pass. With ``shard`` a team has one pass for
        the shard of each of its subdomains, with ``full`` every team has the whole batch in one pass; the ranks of a
        team split each pass evenly.
        """
        if local_data == "shared":
            return [split(batch_size, self.ranks, rank)]
        members = self.ranks_of(self.team_of(rank))
        member = rank - members.start
        if local_data == "full":
            passes = [(0, batch_size)]
        else:
            passes = [split(batch_size, self.subdomains, index) for index in self.subdomains_of(self.team_of(rank))]
        ranges = []
        for start, stop in passes:
            first, last = split(stop - start, len(members), member)
            ranges.append((start + first, start + last))
        return ranges

    def smallest_batch(self, local_data: LocalData) -> int:
        """Samples that a batch needs so that no rank has an empty pass."""
        if local_data == "shared":
            return self.ranks
        members = -(-self.ranks // self.count)
        return members if local_data == "full" else members * self.subdomains
