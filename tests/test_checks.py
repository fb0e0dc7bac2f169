"""navit.train.checks: what is looked at before a run."""

import pytest

from navit.input.synthetic import SyntheticSource
from navit.train.checks import _some_captions


class Counted(SyntheticSource):
    """Says which records it was asked for, of as many as it claims to have."""

    def __len__(self) -> int:
        return self.claimed

    def captions(self, index: int) -> tuple[str, ...]:
        self.asked.append(index)
        return (str(index),)


@pytest.mark.parametrize("size", [1, 31, 40, 100_000])
def test_captions_are_looked_at_in_few_stretches_from_end_to_end(size):
    source = Counted(size=3)
    source.claimed, source.asked = size, []
    assert _some_captions(source) == [str(i) for i in source.asked]
    assert source.asked == sorted(set(source.asked))
    assert source.asked[0] == 0 and source.asked[-1] == size - 1
    assert len(source.asked) == min(size, 256)
    assert len({i // 64 for i in source.asked}) <= 16  # row groups of a Parquet file
