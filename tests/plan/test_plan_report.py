"""navit.plan.report: what `navit plan` shows."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from navit.config import DataConfig
from navit.plan.epoch import plan_block
from navit.plan.report import plot, report, table


@pytest.fixture(scope="module")
def sizes():
    return np.random.default_rng(0).integers(200, 900, (3000, 2))


def test_the_report_is_what_the_plan_is(sizes, tmp_path):
    data = DataConfig(budgets=(64, 256), row_tokens=512, rows=8, slots=8)
    found = report(sizes, data, patch_size=16, row_lengths=(1024, 2048))
    assert [line.row_tokens for line in found.lines] == [512, 1024, 2048]
    rows = plan_block(sizes, data, patch_size=16, epoch=0, slots=8)
    own = found.lines[0]
    used = rows.slice(0, len(rows) // 8 * 8)
    assert own.steps_per_epoch == len(rows) // 8
    assert own.padding == 1 - used.lengths.sum() / (len(used) * 512)
    assert own.images_per_row == len(used.index) / len(used)
    assert own.slots_filled == own.images_per_row / 8
    assert own.captions_filled == own.slots_filled
    few = dataclasses.replace(data, caption_rows=4)
    few = report(sizes, few, patch_size=16, row_lengths=(1024, 4096)).lines
    assert all(line.captions_filled > own.captions_filled for line in few)
    assert few[0].captions_filled > 0.9
    # The same tokens per batch in longer rows: as many steps, up to rounding.
    assert abs(found.lines[2].steps_per_epoch - own.steps_per_epoch) <= 0.1 * (
        own.steps_per_epoch
    )
    # Half of the images at 64 of 256 tokens leave most of such a row empty.
    assert 0.3 < found.alone < 0.45
    text = table(found, 512)
    assert "512*" in text and f"{own.padding:.2%}" in text
    assert f"{own.captions_filled:.0%}" in text
    assert "Packing will not help" not in text
    plot(found, tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as image:
        assert image.width > 500


def test_it_says_when_packing_will_not_help():
    squares = np.full((500, 2), 640)
    data = DataConfig(budgets=(256,), row_tokens=1024)
    text = table(report(squares, data, patch_size=16, row_lengths=()), 1024)
    assert "Packing will not help" in text and "0.00% padding" in text


def test_a_row_shorter_than_an_image_is_refused(sizes):
    data = DataConfig(budgets=(256,), row_tokens=1024)
    with pytest.raises(ValueError, match=r"row of 128 tokens .* image of 256"):
        report(sizes, data, patch_size=16, row_lengths=(128,))


def test_longer_rows_keep_whole_groups_in_each_lane():
    """Half the rows are half a group for each lane: the groups shrink, not the plan."""
    data = DataConfig(
        budgets=(16,), row_tokens=64, rows=8, lanes=4, caption_rows=2, workers=4
    )
    sizes = np.full((400, 2), 64)
    found = report(sizes, data, patch_size=16, row_lengths=(128, 256))
    assert [line.row_tokens for line in found.lines] == [64, 128, 256]
    assert all(line.steps_per_epoch > 0 for line in found.lines)
    assert found.left_out is None
