"""navit.bench.training: what it times."""

import numpy as np

from navit.bench import training


def test_every_step_holds_whole_images_in_valid_rows():
    for mix, row in (("navit", 576), ("naflex", 1024), ("native", 1024)):
        parts = training._steps(mix, row, 2, 2)
        slots = max(int(np.diff(part.offsets).max()) for part in parts)
        numbers = np.concatenate([part.index for part in parts])
        assert [len(part) for part in parts] == [2, 2]
        assert len(set(numbers.tolist())) == len(numbers)
        for part in parts:
            batch = training._batch(part, row, slots)
            batch.images.check()
            assert (batch.images.grids.prod(-1).sum(-1) <= row).all()
            assert (batch.label >= 0).sum() == len(part.grids)
