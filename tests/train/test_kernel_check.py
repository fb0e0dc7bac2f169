"""Kernels prove themselves before training, and one that fails is replaced."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config

from navit.config import override
from navit.evals import budgets
from navit.kernels import fused
from navit.losses import contrastive
from navit.model import attention
from navit.sharding import Rules, make_mesh
from navit.train import hosts, kernel_cases, kernel_check, loop
from navit.train.checkpoint import Checkpoints
from navit.train.checks import changes, rounding_changes
from navit.train.comparison import Case, Implementation, Verdict, verdicts
from navit.train.kernel_check import replace_failed

KERNELS = {
    "vision attention splash",
    "vision fused_mlp",
    "vision norm_project",
    "text attention splash",
    "text fused_mlp",
    "text norm_project",
    "loss gather",
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
    monkeypatch.setattr(kernel_cases, "fits", lambda x, *others: x.shape[-1] == 128)
    monkeypatch.setattr(kernel_check, "captions_beside", lambda count, length: 4)


def leaky(qkv, segment_ids, *, width, interpret=False):
    """An attention kernel that lets each token see its whole row."""
    return attention.attention_qkvpacked(qkv, None, width=width)


def refuse(monkeypatch):
    """Fused layers that the compiler refuses."""

    def call(self, *args, **kwargs):
        raise NotImplementedError("Mosaic failed to compile\nand a screen of more")

    monkeypatch.setattr(fused.Call, "__call__", call)


def right(x, weights):
    return x * weights


def first(x):
    """A sum over the altered image, too small to differ by more than rounding."""
    return 1e-6 * x[0, :2].sum()


def refused(x, weights):
    raise RuntimeError("\nout of vector memory\nand a screen of more")


WRONG = {
    "in value": lambda x, w: 1.001 * right(x, w),
    "in the inputs' gradient": lambda x, w: right(jax.lax.stop_gradient(x), w),
    "in the weights' gradient": lambda x, w: right(x, jax.lax.stop_gradient(w)),
    "leaks values": lambda x, w: right(x, w) + jax.lax.stop_gradient(first(x)),
    "leaks gradients": lambda x, w: (
        right(x, w) + first(x) - jax.lax.stop_gradient(first(x))
    ),
    "nan at padding": lambda x, w: right(x, w).at[1].set(jnp.nan),
    "does not compile": refused,
}


def small_case(implementations, dtype, *, plain=right):
    """One row of two images of two tokens, and one of padding."""
    real = jnp.asarray([[True] * 4, [False] * 4])
    x, w = jax.random.normal(jax.random.key(0), (2, 2, 4, 3), dtype)
    return Case(
        plain=plain,
        implementations=[Implementation(*x) for x in implementations.items()],
        inputs=(x,),
        weights=w[0],
        real=real,
        altered=real & (jnp.arange(4) < 2),
        terms=256,
    )


def test_what_is_wrong_is_found_and_rounding_is_not():
    """In float32 and bfloat16, by their tolerances."""
    for dtype in (jnp.float32, jnp.bfloat16):
        rounded = jnp.asarray(1 + 2 * float(jnp.finfo(dtype).eps), dtype)
        implementations = {
            "right": right,
            "rounded": lambda x, w, rounded=rounded: right(x, w) * rounded,
            **WRONG,
        }
        by_name = {
            x.name: x for x in verdicts(small_case(implementations, dtype), timed=False)
        }
        assert {name for name in by_name if not by_name[name].failed} == (
            {"right", "rounded"} | ({"in value"} if dtype == jnp.bfloat16 else set())
        ), by_name
        assert by_name["does not compile"].outcome == "does not compile"
        assert by_name["does not compile"].why == "out of vector memory"
        assert by_name["nan at padding"].why == "a result is NaN or infinite"


def test_a_plain_path_that_fails_ends_no_run():
    case = small_case({"right": right}, jnp.float32, plain=refused)
    (verdict,) = verdicts(case, timed=False)
    assert verdict.outcome == "not checked" and not verdict.failed
    assert verdict.why == "the plain path fails: out of vector memory"


def test_rows_whose_dense_mask_does_not_fit_are_not_checked(monkeypatch):
    """Two heads over 3 rows of 256 tokens: more logits than the limit."""
    config = kernel_config("data.row_tokens=256", "data.budgets=64")
    ids = np.ones((3, 256), np.int32)

    def misfits():
        case = kernel_cases.attention_case(
            config,
            "vision",
            config.model.vision,
            ids,
            ["xla", "splash"],
            longest=256,
            tensor=1,
        )
        return [x.misfit for x in case.implementations]

    assert misfits() == [None, None]
    monkeypatch.setattr(kernel_cases, "_LOGITS", 2 * 3 * 256**2 - 1)
    assert all("logits would take" in x for x in misfits())


@pytest.fixture
def all_ok(monkeypatch):
    """Takes every kernel for good without running it."""

    def good(case, *, timed):
        assert not timed
        return [Verdict(x.name, "ok") for x in case.implementations]

    monkeypatch.setattr(kernel_check, "verdicts", good)


@pytest.mark.parametrize(
    "overrides, unused",
    [
        ([], set()),
        (["model.fused=false"], {x for x in KERNELS if "_" in x}),
        (["model.attention=xla"], {x for x in KERNELS if "attention" in x}),
        (["model.vision.qk_norm=true"], {"vision norm_project"}),
        (["model.vision.act=exact"], {"vision fused_mlp"}),
        (["model.vision.norm=rms"], {"vision fused_mlp", "vision norm_project"}),
        (["train.losses.sigmoid.implementation=dense"], {"loss gather"}),
        (["train.losses=softmax"], {"loss gather"}),
        (["train.check_kernels=false"], KERNELS),
    ],
)
def test_only_the_kernels_that_a_config_uses_are_checked(
    on_a_tpu, all_ok, overrides, unused, caplog
):
    caplog.set_level("INFO", "navit")
    config = kernel_config(*overrides)
    assert replace_failed(config, None, Rules()) == config
    checked = {name for name in KERNELS if name in caplog.text}
    assert checked == KERNELS - unused
    assert "loss ring" not in caplog.text  # one device has no ring


@pytest.mark.parametrize(
    "implementation, texts, ring",
    [("auto", 2**28, False), ("auto", 1000, True), ("ring", 2**28, True)],
)
def test_a_ring_is_checked_only_where_training_takes_one(
    on_a_tpu, all_ok, monkeypatch, caplog, implementation, texts, ring
):
    caplog.set_level("INFO", "navit")
    monkeypatch.setattr(contrastive, "_GATHERED", texts)
    config = kernel_config(
        "mesh.data=2", f"train.losses.sigmoid.implementation={implementation}"
    )
    assert replace_failed(config, *make_mesh(config.mesh)) == config
    assert "loss gather" in caplog.text  # it would replace a ring that fails
    assert ("loss ring" in caplog.text) == ring


def test_long_rows_are_checked_with_the_kernel_that_skips(on_a_tpu, all_ok, caplog):
    caplog.set_level("INFO", "navit")
    config = kernel_config("data.row_tokens=1280")
    assert replace_failed(config, None, Rules()) == config
    assert "vision attention splash_skip" in caplog.text


def test_nothing_is_checked_on_a_cpu(monkeypatch):
    monkeypatch.setattr(kernel_check, "verdicts", None)
    config = kernel_config()
    assert replace_failed(config, None, Rules()) == config


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
    assert replace_failed(config, None, Rules()) == expected
    (warning,) = (x.getMessage() for x in caplog.records if x.levelname == "WARNING")
    assert "text fused_mlp differs (on host 1)" in warning


def test_a_kernel_that_fails_is_replaced_and_the_run_goes_on(
    on_a_tpu, monkeypatch, caplog, tmp_path
):
    """The losses are exactly those of the plain path, and the config is the same.

    Without the check, the model would take the kernel, and its losses would be others.
    """
    monkeypatch.setattr(kernel_check, "captions_beside", lambda count, length: 0)
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setitem(attention.KERNELS, "splash", leaky)
    evaluated = []
    monkeypatch.setattr(budgets, "run", lambda model, *_, **__: evaluated.append(model))
    config = kernel_config(
        "data.rows=2",
        "model.text.width=16",  # too small for fused layers
        "train.steps=2",
        "train.log_every=1",
        "train.checkpoint_every=1",
        "optim.warmup_steps=1",
    )
    plain = override(config, ["model.attention=xla", "model.fused=false"])
    unchecked = override(config, ["train.check_kernels=false"])
    with monkeypatch.context() as broken:
        refuse(broken)
        assert loop.train(config, tmp_path / "replaced")
        lines = [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]
        assert loop.train(unchecked, tmp_path / "unchecked")
    assert loop.train(plain, tmp_path / "plain")

    assert len(lines) == 3
    assert sum("attention splash differs (" in x for x in lines) == 1
    assert sum("does not compile (Mosaic failed to compile)" in x for x in lines) == 2
    assert sum("Evaluate with model.attention=xla too" in x for x in lines) == 1
    assert sum("Evaluate with model.fused=false too" in x for x in lines) == 2

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [(x["loss"], x["grad_norm"]) for x in map(json.loads, lines)]

    assert losses("replaced") == losses("plain") and len(losses("plain")) == 2
    assert losses("unchecked")[0] != losses("plain")[0]
    taken = [x.model.vision.implementation for x in evaluated]
    assert taken == ["xla", None, "xla"]

    # With working kernels, it is the same run, and the log of changes says so.
    checkpoints = Checkpoints(tmp_path / "replaced")
    assert checkpoints.config() == config
    checkpoints.close()
    shutil.rmtree(tmp_path / "replaced/checkpoints/2")
    assert loop.train(unchecked, tmp_path / "replaced")
    path = tmp_path / "replaced/changes.jsonl"
    assert [json.loads(x) for x in path.read_text().splitlines()] == [
        {
            "step": 0,
            "changes": [],
            "replaced": [
                "model.attention: 'auto' -> 'xla'",
                "model.fused: True -> False",
            ],
        },
        {"step": 1, "changes": [], "replaced": []},
    ]
    assert not (tmp_path / "plain/changes.jsonl").exists()


@pytest.mark.parametrize(
    "broken, chosen, expected",
    [("_in_a_ring", "ring", "gather"), ("_gathered", "auto", "dense")],
)
def test_a_loss_that_fails_is_replaced_by_a_plainer_one(
    on_a_tpu, monkeypatch, caplog, broken, chosen, expected
):
    real = getattr(contrastive, broken)

    def wrong(images, texts, scale, bias, real_slots, *, axes):
        value, gradients = real(images, texts, scale, bias, real_slots, axes=axes)
        return value * 1.001, gradients

    monkeypatch.setattr(contrastive, broken, wrong)
    config = kernel_config(
        "mesh.data=2",
        "model.fused=false",
        "model.attention=xla",
        f"train.losses.sigmoid.implementation={chosen}",
    )
    assert replace_failed(config, *make_mesh(config.mesh)) == override(
        config, [f"train.losses.sigmoid.implementation={expected}"]
    )
    assert f"train.losses.sigmoid.implementation={expected}" in caplog.text
