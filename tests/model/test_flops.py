"""Model FLOPs, against counts by hand and against XLA's own."""

import jax
import pytest
from flax import nnx
from helpers import tiny_config

from navit.batch import Batch, PackedImages
from navit.config import (
    Config,
    ModelConfig,
    PositionConfig,
    TextConfig,
    VisionConfig,
    override,
)
from navit.model import flops, variants
from navit.model.flops import Counts, Flops
from navit.model.two_tower import TwoTower
from navit.train.step import batch_loss


def test_by_hand():
    """Two images of 3 and 4 tokens in a tower of width 8."""
    model = ModelConfig(
        vision=VisionConfig(patch_size=2, width=8, depth=3, mlp_dim=10, num_heads=2),
        text=TextConfig(length=5, width=6, depth=2, mlp_dim=7, num_heads=2),
    )
    found = flops.forward(model, Counts(7, 9 + 16, 2, 2, 4))
    assert found == Flops(
        vision=7 * (2 * 12 * 8 + 3 * (4 * 2 * 8 * 8 + 2 * 2 * 8 * 10)),
        attention=3 * 25 * (2 * 8 + 2 * 8),
        head=7 * (2 * 2 * 8 * 8 + 2 * 2 * 8) + 2 * (2 * 8 * 8 + 2 * 2 * 8 * 10),
        text=2
        * (2 * (5 * (4 * 2 * 6 * 6 + 2 * 2 * 6 * 7) + 5 * 5 * 2 * 2 * 6) + 2 * 6 * 8),
        loss=4 * 2 * 8,
    )
    assert found.total == 18_816 + 2_400 + 2_912 + 11_712 + 64


def test_absent_parts_cost_nothing():
    vision = VisionConfig(width=8, num_heads=2, pool="mean", num_classes=5, embed_dim=4)
    found = flops.forward(ModelConfig(vision=vision, text=None), Counts(100, 1000, 3))
    assert found.text == found.loss == 0
    assert found.head == 3 * (2 * 8 * 4 + 2 * 4 * 5)
    assert flops.forward(ModelConfig(), Counts()).total == 0


def test_a_large_tower_costs_two_a_parameter_and_token():
    """So400m: 6 N D for forward and backward, without attention (PaLM, app. B)."""
    model = ModelConfig(vision=variants.vision("So400m/16"), text=None)
    tower = jax.eval_shape(lambda: TwoTower(model, rngs=nnx.Rngs(0)).vision)
    parts = (tower.patch, tower.encoder)
    parameters = sum(x.size for x in jax.tree.leaves(parts))
    assert flops.forward(model, Counts(tokens=1)).vision == pytest.approx(
        2 * parameters, rel=2e-3
    )


@pytest.mark.parametrize(
    "lrs, factors",
    [((1.0, 1.0), (3, 3, 3)), ((1.0, 0.0), (3, 1, 2)), ((0.0, 0.5), (1, 3, 2))],
)
def test_a_frozen_tower_has_no_backward_pass(lrs, factors):
    lrs = [f"optim.vision_lr={lrs[0]}", f"optim.text_lr={lrs[1]}"]
    config = override(tiny_config(), lrs)
    counts = Counts(50, 700, 4, 4, 16)
    once, found = flops.forward(config.model, counts), flops.train_step(config, counts)
    ratios = found.vision / once.vision, found.text / once.text, found.loss / once.loss
    assert ratios == factors
    assert found.attention / once.attention == found.head / once.head == factors[0]


@pytest.mark.parametrize("pool", ["map", "mean"])
def test_against_xla(pool):
    """The forward pass of full rows with one image each, by XLA's cost analysis."""
    b, n, t = 3, 64, 16
    model = ModelConfig(
        vision=VisionConfig(
            patch_size=8,
            width=192,
            depth=3,
            mlp_dim=768,
            num_heads=3,
            position=PositionConfig(kind="factorized", encoding="sinusoidal"),
            pool=pool,
            embed_dim=128,
        ),
        text=TextConfig(length=t, width=128, depth=2, mlp_dim=512, num_heads=2),
        attention="xla",
        scan_unroll=3,  # XLA counts the body of a loop once
    )
    config = Config(model=model)

    def array(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    images = PackedImages(
        array(b, n, 192, dtype="uint8"),
        array(b, n),
        array(b, n, 2),
        array(b, 1, 2),
    )
    batch = Batch(
        images=images,
        text=array(b, 1, t),
        owner=array(b, 1),
        label=array(b, 1),
        id=None,
        size=array(b, 1, 2),
    )
    tower = jax.eval_shape(lambda: TwoTower(model, rngs=nnx.Rngs(0)))
    lowered = jax.jit(lambda m, x: batch_loss(m, x, config)).lower(tower, batch)
    expected = lowered.cost_analysis()["flops"]
    found = flops.forward(model, Counts(b * n, b * n * n, b, b, b * b))
    assert found.total == pytest.approx(expected, rel=0.03)


def test_peaks_are_per_device():
    for kind, peak in {
        "TPU v4": 275,
        "TPU v5 lite": 197,
        "TPU v5": 459,
        "TPU v5p": 459,
        "TPU v6 lite": 918,
        "TPU v6e": 918,
        "TPU7x": 1153.5,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H200": 989,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA L40": 181,
    }.items():
        assert flops.peak(kind) == peak * 1e12, kind
    assert flops.peak("cpu") is None
