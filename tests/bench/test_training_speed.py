"""navit.bench.training and attention_speed: what they time."""

import numpy as np
import pytest

from navit.bench import attention_speed, torch_pair, training


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


@pytest.mark.parametrize(
    "text, message",
    [("1x256", "not rows x"), ("1x256xnaflx", "native"), ("1x256xnaflex", "1024")],
)
def test_a_mix_that_cannot_be_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        attention_speed._mix(text)


def test_an_implementation_that_does_not_run_is_named(capsys):
    """On a CPU: cuDNN is not there, and "flash" is for GPUs."""
    attention_speed._line(["xla", "flash", "cudnn"], 1, 64, "2", 1, 16, 1, None)
    text = capsys.readouterr().out
    assert "flash is left out: implementation='flash' is a GPU kernel" in text
    assert "cudnn is left out: cuDNN is not detected" in text
    for line, what in zip(
        text.splitlines()[-2:], ("forward", "gradients"), strict=True
    ):
        assert line.split()[5] == what and line.split()[8:] == ["-", "-"]


def test_a_step_of_both_towers_has_a_caption_for_every_image():
    parts = training._steps("navit", 576, 2, 2)
    config = torch_pair._config("Ti", 576, parts, 576)
    counts = torch_pair._counts(parts)
    assert counts.images == sum(len(part.grids) for part in parts)
    for part in parts:
        batch = torch_pair._batch(config, part)
        batch.images.check()
        images, slots = batch.owner.shape
        assert batch.text.shape == (images, slots, torch_pair.CAPTION)
        owned = batch.owner[batch.owner >= 0]
        assert len(owned) == len(part.grids) and owned.max() < slots


def test_the_best_and_the_least_ratio_are_held_to_their_aims():
    assert training._verdict("native", [1.4, 0.9]) == (
        "native: best 1.40, aim 1.3 met; least 0.90, aim 1.0 missed"
    )
