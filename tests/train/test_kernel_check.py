"""Kernels prove themselves before training, and one that fails is replaced."""

import json

import jax
import jax.numpy as jnp
import pytest
from helpers import tiny_config

from navit.config import override
from navit.evals import budgets
from navit.kernels import fused, splash_blocks
from navit.losses import contrastive
from navit.sharding import Rules, make_mesh
from navit.train import hosts, kernel_cases, kernel_check, loop
from navit.train.checkpoint import Checkpoints
from navit.train.checks import changes, rounding_changes
from navit.train.comparison import Case, Implementation, Verdict, judged
from navit.train.kernel_check import proven

KERNELS = {
    "vision attention splash",
    "vision fused_mlp",
    "vision norm_project",
    "text attention splash",
    "text fused_mlp",
    "text norm_project",
    "loss gather",
    "loss ring",
}


def kernel_config(*overrides):
    """A config whose rows and widths the kernels take."""
    sizes = ["width=128", "num_heads=2", "mlp_dim=128", "depth=1"]
    towers = [f"model.{t}.{size}" for t in ("vision", "text") for size in sizes]
    config = override(tiny_config(), [*towers, "model.text.length=32"])
    return override(config, ["data.row_tokens=128", "data.rows=4", *overrides])


@pytest.fixture
def on_a_tpu(monkeypatch):
    """The checks behave as on a TPU, with its kernels interpreted."""
    for module in (kernel_check, kernel_cases):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    monkeypatch.setattr(kernel_cases, "fits", lambda *args: True)
    monkeypatch.setattr(kernel_check, "captions_beside", lambda count, length: 4)


def leak(monkeypatch):
    """Attention kernels that let each token see its whole row."""

    def logits(self, k, qt, query_ids, key_ids):
        return splash_blocks.dot(k, qt, (1, 0))

    monkeypatch.setattr(splash_blocks.Call, "logits", logits)


def refuse(monkeypatch):
    """Fused layers that the compiler refuses."""

    def call(self, *args, **kwargs):
        raise NotImplementedError("Mosaic failed to compile\nand a screen of more")

    monkeypatch.setattr(fused.Call, "__call__", call)


def right(inputs, weights):
    (x,) = inputs
    return x * weights


def first(inputs):
    """A sum over the altered image, too small to differ by more than rounding."""
    return 1e-6 * inputs[0][0, :2].sum()


def refused(inputs, weights):
    raise RuntimeError("\nout of vector memory\nand a screen of more")


WRONG = {
    "in value": lambda i, w: 1.001 * right(i, w),
    "in the inputs' gradient": lambda i, w: right(jax.lax.stop_gradient(i), w),
    "in the weights' gradient": lambda i, w: right(i, jax.lax.stop_gradient(w)),
    "leaks values": lambda i, w: right(i, w) + jax.lax.stop_gradient(first(i)),
    "leaks gradients": lambda i, w: (
        right(i, w) + first(i) - jax.lax.stop_gradient(first(i))
    ),
    "nan at padding": lambda i, w: right(i, w).at[1].set(jnp.nan),
    "does not compile": refused,
}


def test_what_is_wrong_is_found_and_rounding_is_not():
    """In float32 and bfloat16, by their tolerances."""
    real = jnp.asarray([[True] * 4, [False] * 4])
    altered = real & (jnp.arange(4) < 2)
    for dtype in (jnp.float32, jnp.bfloat16):
        x, w = jax.random.normal(jax.random.key(0), (2, 2, 4, 3), dtype)
        one = jnp.asarray(1, dtype)
        rounded = one + 2 * jnp.finfo(dtype).eps
        implementations = {
            "right": right,
            "rounded": lambda i, w, rounded=rounded: right(i, w) * rounded,
            **WRONG,
        }
        case = Case(
            plain=right,
            implementations=[Implementation(*x) for x in implementations.items()],
            inputs=(x,),
            weights=w[0],
            real=real,
            altered=altered,
            terms=256,
        )
        found = {x.name: x for x in judged(case)}
        assert {name for name in found if not found[name].failed} == (
            {"right", "rounded"} | ({"in value"} if dtype == jnp.bfloat16 else set())
        ), found
        assert found["does not compile"].verdict == "does not compile"
        assert found["does not compile"].why == "out of vector memory"


@pytest.fixture
def all_ok(monkeypatch):
    """Takes every kernel for good without running it."""

    def good(case):
        return [Verdict(x.name, "ok") for x in case.implementations]

    monkeypatch.setattr(kernel_check, "judged", good)


@pytest.mark.parametrize(
    "overrides, unused",
    [
        ([], set()),
        (["model.fused=false"], {x for x in KERNELS if "_" in x}),
        (["model.attention=xla"], {x for x in KERNELS if "attention" in x}),
        (["model.vision.qk_norm=true"], {"vision norm_project"}),
        (["train.losses.sigmoid.implementation=gather"], {"loss ring"}),
        (["train.losses=softmax"], {"loss gather", "loss ring"}),
        (["train.check_kernels=false"], KERNELS),
    ],
)
def test_only_the_kernels_that_a_config_uses_are_checked(
    on_a_tpu, all_ok, overrides, unused, caplog
):
    caplog.set_level("INFO", "navit")
    config = kernel_config(*overrides)
    assert proven(config, None, Rules()) == config
    checked = {name for name in KERNELS if name in caplog.text}
    assert checked == KERNELS - unused


def test_long_rows_are_checked_with_the_kernel_that_skips(on_a_tpu, all_ok, caplog):
    caplog.set_level("INFO", "navit")
    config = kernel_config("data.row_tokens=1280")
    assert proven(config, None, Rules()) == config
    assert "vision attention splash_skip" in caplog.text


def test_nothing_is_checked_on_a_cpu(monkeypatch):
    monkeypatch.setattr(kernel_check, "judged", None)
    config = kernel_config()
    assert proven(config, None, Rules()) == config


def test_a_resumed_run_may_turn_the_checks_off():
    config = kernel_config()
    off = override(config, ["train.check_kernels=false"])
    assert changes(config, off) == rounding_changes(config, off) == []


def test_a_kernel_that_fails_on_one_host_is_replaced_on_all(
    on_a_tpu, all_ok, monkeypatch, caplog
):
    def texts(own):
        return [own, json.dumps({"text fused_mlp": "differs (on host 1)"})]

    monkeypatch.setattr(hosts, "gather_texts", texts)
    config = kernel_config()
    expected = override(config, ["model.fused=false"])
    assert proven(config, None, Rules()) == expected
    (warning,) = (x.getMessage() for x in caplog.records if x.levelname == "WARNING")
    assert "text fused_mlp differs (on host 1)" in warning


def test_a_kernel_that_fails_is_replaced_and_the_run_goes_on(
    on_a_tpu, monkeypatch, caplog, tmp_path
):
    """The losses are exactly those of the plain path, and the config is the same."""
    monkeypatch.setattr(kernel_check, "captions_beside", lambda count, length: 0)
    monkeypatch.setattr(budgets, "run", lambda *args: None)
    config = kernel_config("data.rows=2")
    with monkeypatch.context() as broken:
        leak(broken)
        refuse(broken)
        assert loop.train(config, tmp_path / "replaced")
    lines = [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]
    assert len(lines) == 5
    assert sum("attention splash differs (" in x for x in lines) == 1
    assert sum("does not compile (Mosaic failed to compile)" in x for x in lines) == 4
    assert sum("model.attention=xla" in x for x in lines) == 1
    assert sum("model.fused=false" in x for x in lines) == 4

    plain = override(config, ["model.attention=xla", "model.fused=false"])
    assert loop.train(plain, tmp_path / "plain")

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [(x["loss"], x["grad_norm"]) for x in map(json.loads, lines)]

    assert losses("replaced") == losses("plain") and len(losses("plain")) == 3

    # With working kernels, it is the same run.
    checkpoints = Checkpoints(tmp_path / "replaced")
    assert checkpoints.config() == config
    checkpoints.close()
    assert loop.train(config, tmp_path / "replaced")
    assert not (tmp_path / "replaced/changes.jsonl").exists()


@pytest.mark.parametrize(
    "broken, expected", [("_in_a_ring", "gather"), ("_gathered", "dense")]
)
def test_a_loss_that_fails_is_replaced_by_a_plainer_one(
    on_a_tpu, monkeypatch, caplog, broken, expected
):
    real = getattr(contrastive, broken)

    def wrong(images, texts, scale, bias, real_slots, *, axes):
        value, gradients = real(images, texts, scale, bias, real_slots, axes=axes)
        return value * 1.001, gradients

    monkeypatch.setattr(contrastive, broken, wrong)
    config = kernel_config("mesh.data=2", "model.fused=false", "model.attention=xla")
    mesh, rules = make_mesh(config.mesh)
    found = proven(config, mesh, rules)
    assert found == override(
        config, [f"train.losses.sigmoid.implementation={expected}"]
    )
    assert f"train.losses.sigmoid.implementation={expected}" in caplog.text
