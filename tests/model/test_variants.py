import dataclasses
import math

import jax
import pytest
from flax import nnx

from navit.config import ModelConfig
from navit.model import variants
from navit.model.two_tower import TwoTower

# Width, depth, MLP and heads as the SigLIP 2 and ViT papers state them.
PUBLISHED = {
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "g": (1536, 40, 6144, 16),
}


def tower_parameters(width, depth, mlp):
    """Weights and biases of `depth` blocks and the final norm, counted by hand."""
    block = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
    return depth * block + 2 * width


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_and_parameter_counts(size):
    width, depth, mlp, heads = PUBLISHED[size]
    config = ModelConfig(
        vision=variants.vision(f"{size}/16"),
        text=variants.text(size, vocab_size=256_000),
    )
    found = config.vision
    assert (found.width, found.depth, found.mlp_dim, found.num_heads) == (
        PUBLISHED[size]
    )
    assert width % heads == 0
    model = jax.eval_shape(lambda: TwoTower(config, rngs=nnx.Rngs(0)))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(model))
    patch, table = 768 * width + width, 256 * width
    linear = width * width + width
    map_head = 4 * linear + width + 2 * width + 2 * width * mlp + mlp + width
    text = 256_000 * width + 64 * width + linear
    towers = 2 * tower_parameters(width, depth, mlp)
    assert count == towers + patch + table + map_head + text + 2


def test_overrides_and_errors():
    assert variants.vision("B/32").patch_size == 32
    assert variants.vision("S/14", qk_norm=True).qk_norm
    assert dataclasses.asdict(variants.text("B", length=16))["length"] == 16
    with pytest.raises(ValueError, match=r"no size 'XXL'; choose one of Ti, S, B"):
        variants.vision("XXL/16")
    with pytest.raises(ValueError, match="a size and a patch"):
        variants.vision("B")
