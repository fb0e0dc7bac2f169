"""navit compile: reading and summing what the TPU compiler reports for a step."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from navit.compile import schedule, topology
from navit.compile.kernel_times import Kernel, skipping
from navit.compile.printout import (
    _communication,
    _is_priced,
    _parts,
    _work,
    compile_program,
    part_of,
    table,
)
from navit.compile.program import Program, visited_blocks
from navit.model import flops
from navit.plan.rows import Rows

# ruff: noqa: E501
PROGRAM = """HloModule jit_step

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]{1,0}) parameter(0)
  %gather.1 = bf16[16,4]{1,0} all-gather(%p), metadata={op_name="jit(f)/jvp(vision)/while/body/mlp/reshard"}
  %kernel.1 = bf16[8,4]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/vision/attention/k"}, backend_config={"x":"{
}"}
  ROOT %fusion.1 = (s32[], bf16[8,4]{1,0}) fusion(%p), kind=kLoop, calls=%inner, metadata={op_name="jit(f)/jvp(vision)/while/body/mlp/dot"}, backend_config={"estimated_cycles":"100"}
}

%condition (p: (s32[], bf16[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%p, %n), direction=LT
}

%inner (a: bf16[8,4], b: bf16[4,16]) -> bf16[8,16] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = bf16[4,16]{1,0} parameter(1)
  %r = f32[8,16]{1,0} all-reduce(%a), to_apply=%add
  ROOT %dot.1 = bf16[8,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %while.1 = (s32[], bf16[8,4]{1,0}) while(%x), condition=%condition, body=%body, metadata={op_name="jit(f)/jvp(vision)/while"}
  %unpriced.1 = bf16[8,16]{1,0} fusion(%x), kind=kCustom, calls=%inner, metadata={op_name="jit(f)/loss/dot"}
  ROOT %unknown.1 = bf16[8,4]{1,0} copy(%x), backend_config={"estimated_cycles":"9223372036854775807"}
}
"""


def test_operations_run_as_often_as_their_loop():
    found = {op.name: op for op in schedule.operations(PROGRAM)}
    assert found["fusion.1"].cycles == 100 and found["fusion.1"].runs == 12
    assert found["kernel.1"].kernel and found["kernel.1"].runs == 12
    # Without cycles, the FLOPs of its matrix product; nothing if the cost is unknown.
    assert found["unpriced.1"].products == 2 * 8 * 16 * 4
    assert found["fusion.1"].products == 0
    assert found["unknown.1"].cycles == 0


def test_fused_communication_is_counted_too():
    sent = [x for op in schedule.operations(PROGRAM) for x in op.collectives]
    assert {(x.kind, x.dtype, x.shape, x.bytes, x.runs) for x in sent} == {
        ("all-gather", "bf16", (16, 4), 128, 12),
        ("all-reduce", "f32", (8, 16), 512, 12),
        ("all-reduce", "f32", (8, 16), 512, 1),
    }


def test_a_scattered_sum_is_a_reduce_scatter():
    text = PROGRAM.replace("%inner", "%all-reduce-scatter.3")
    kinds = [x.kind for op in schedule.operations(text) for x in op.collectives]
    assert sorted(kinds) == ["all-gather", "reduce-scatter", "reduce-scatter"]
    one = "  %piece.1 = bf16[2,4]{1,0} reduce-scatter(%x), dimensions={0}\n  ROOT %unkn"
    text = PROGRAM.replace("  ROOT %unkn", one)
    (found,) = (op for op in schedule.operations(text) if op.name == "piece.1")
    assert [x.shape for x in found.collectives] == [(8, 4)]


def test_times_are_cycles_of_every_run_and_kernels():
    """At 1 GHz: 12 runs of 100 cycles, a kernel of 10 steps of 50, and products."""
    operations = schedule.operations(PROGRAM)
    kernel = Kernel(turn=50, steps=10, fill=0, body=50, branches=(), around=0)
    found = _parts(operations, {"kernel.1": kernel}, clock=1e9, peak=1e12)
    assert found["mlp"] == pytest.approx(12 * 100e-6)
    assert found["attention"] == pytest.approx(12 * 500e-6)
    assert found["loss"] == pytest.approx(1024 / 1e12 * 1e3)
    assert sum(found.values()) == pytest.approx(12 * 600e-6 + 1024e-9)


def test_a_kernel_declares_which_steps_run_its_branches():
    """Its metadata is on separate lines of the program."""
    text = PROGRAM.replace(
        'custom_call_target="tpu_custom_call", ',
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={'
        '\n"taken":"0.5 0.1"\n}}, cost={"flops":"4000000"} ',
    )
    (op,) = (x for x in schedule.operations(text) if x.kernel)
    assert op.taken == (0.5, 0.1) and op.runs == 12
    assert op.scope == "jit(f)/vision/attention/k"
    kernel = Kernel(turn=50, steps=10, fill=0, body=50, branches=(20, 10), around=0)

    def attention(kernel, peak):
        found = _parts([op], {"kernel.1": kernel}, clock=1e9, peak=peak)
        return found["attention"] / 12 * 1e6

    assert attention(kernel, 1e14) == pytest.approx(10 * (50 - 10 - 9))
    # Never less than the matrix units need; all branches if their number differs.
    assert attention(kernel, 4e12) == pytest.approx(1000)
    other = dataclasses.replace(kernel, branches=(20,))
    assert attention(other, 1e14) == pytest.approx(500)


def test_attention_that_skips_counts_what_it_visits():
    (op,) = (x for x in schedule.operations(PROGRAM) if x.kernel)
    op = dataclasses.replace(op, kernel="splash_backward")
    kernel = Kernel(turn=50, steps=8, fill=0, body=50, branches=(4, 20, 6), around=0)
    # Four blocks of queries: sums are cleared and written once; 2.5 turns of the loop.
    found = _parts([op], {"kernel.1": kernel}, 1e9, 1e12, visited=(4, 2.5))
    expected = 8 * (20 + 4 / 4 + 2.5 * 20 + 6 / 4)
    assert found["attention"] / 12 * 1e6 == pytest.approx(expected)
    # Unknown branches: all are counted, and the kernel is reported as unpriced.
    other = {"kernel.1": dataclasses.replace(kernel, branches=(1, 2, 3, 4))}
    assert skipping(other["kernel.1"], 4, 2.5) is None
    assert not _is_priced(op, other, (4, 2.5))
    assert _is_priced(op, {"kernel.1": kernel}, (4, 2.5))


def test_a_recomputed_kernel_has_the_same_key():
    (op,) = (x for x in schedule.operations(PROGRAM) if x.kernel)
    forward = dataclasses.replace(op, kernel="splash_forward.3")
    again = dataclasses.replace(op, kernel="splash_forward.1.remat")
    assert _work(forward) == _work(again)
    backward = dataclasses.replace(op, kernel="splash_backward")
    assert _work(dataclasses.replace(op, kernel="splash_forward")) != _work(backward)
    other = dataclasses.replace(again, scope="jit(f)/text/attention/k")
    assert _work(other) != _work(forward)


def test_blocks_visited_are_those_of_the_plan():
    """Rows of 1536 in blocks of 512: an image of 512 tokens sees its own block."""
    grids = np.array([[16, 32]] * 6 + [[32, 32]], np.int32)
    rows = Rows(np.array([0, 3, 6, 7]), np.arange(7), grids)
    # Two rows of three such images; then one image over two blocks, and a padding block.
    assert visited_blocks(rows, 1536) == pytest.approx((6 * 1 + 2 * 2 + 0) / 9)


def test_communication_is_listed_with_totals():
    def sent(mib, count):
        of = dict(kind="all-gather", dtype="f32", shape=[8], part="mlp")
        return of | dict(bytes=mib * 2**20, count=count)

    found = _communication([sent(9, 2), sent(0.1, 3)])
    assert "9.00 x 2    =         18  mlp" in found[1]
    assert "less than 1 MiB each, 3 in all" in found[2]
    assert found[3].split() == ["all-gather", "in", "all", "18"]
    assert _communication([]) == ["no communication"]


def test_text_without_a_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        schedule.operations("HloModule nothing\n")
    with pytest.raises(ValueError, match="no trip count"):
        schedule.operations(PROGRAM.replace("constant(12)", "parameter(0)"))


@pytest.mark.parametrize(
    "scope, part",
    [
        ("jit(train_step)/transpose(jvp(vision))/while/body/mlp/dot_general", "mlp"),
        ("jit(train_step)/jvp(vision)/embedding/dot_general", "embedding"),
        ("jit(train_step)/jvp(text)/embedding/gather", "text embedding"),
        ("jit(train_step)/transpose(jvp(text))/while/body/mlp/add", "text tower"),
        ("jit(train_step)/jvp(loss)/log", "loss"),
        ("jit(train_step)/optimizer/sqrt", "optimizer"),
        ("jit(train_step)/jvp(vision)/while/body/add", "vision, other"),
        ("", "other"),
    ],
)
def test_parts(scope, part):
    assert part_of(scope) == part


@pytest.mark.parametrize(
    "name",
    ["v6e", "v4:2x2x1", "v5e:4x4x4", "v5p:4x4", "v6e:ax4", "h100", "h100:0", "a10:1"],
)
def test_an_unknown_slice_is_an_error(name):
    with pytest.raises(ValueError, match=r"v5e|v5p|v6e"):
        topology.devices(name)


def test_gpus_of_several_slices_are_refused():
    with pytest.raises(ValueError, match=r"mesh\.slices=2 .*h100:8 is one node"):
        topology.devices("h100:8", 2)


def test_a_gpu_has_the_memory_that_jax_takes_and_no_clock(monkeypatch):
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    monkeypatch.delenv(name, raising=False)
    assert topology.chip("h100:8") == (pytest.approx(0.75 * 79.11), None)
    monkeypatch.setenv(name, ".9")
    assert topology.chip("t4:1").memory == pytest.approx(0.9 * 14.76)
    assert topology.is_gpu("t4:1") and not topology.is_gpu("v6e:4x4")


def test_a_gpus_kernels_are_counted():
    """Pallas' by their name, a library's by its routine."""
    cublas = 'custom_call_target="__cublas$lt$matmul", backend_config={}'
    text = PROGRAM.replace('custom_call_target="tpu_custom_call"', cublas)
    (op,) = (x for x in schedule.operations(text) if x.kernel)
    assert (op.kernel, op.runs) == ("__cublas$lt$matmul", 12)
    flash = (
        'custom_call_target="__gpu$xla.gpu.triton", backend_config={ir = "ML", '
        'name = "flash_forward", num_stages = 2 : i32}'
    )
    text = PROGRAM.replace('custom_call_target="tpu_custom_call"', flash)
    assert [x.kernel for x in schedule.operations(text) if x.kernel] == [
        "flash_forward"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t4:1", "h100:2"])
def test_a_step_compiles_for_gpus(tmp_path, name):
    """With jax's CUDA plugin, on a machine without a GPU or its driver."""
    pytest.importorskip("jax_plugins.xla_cuda12", reason="jax[cuda12] is not installed")
    kernel = "xla" if name == "t4:1" else "flash"
    more = (f"model.attention={kernel}", "model.vision.depth=1", "data.rows=8")
    done, (found,) = compile_quickstart(tmp_path, *more, topology=name)
    assert done.returncode == 0, done.stdout
    assert found["fits"] and 0 < found["memory"]["peak"] < found["memory"]["limit"]
    assert "no times: the GPU's compiler writes no schedule" in done.stdout
    assert ("flash_backward" in found["kernels"]) == (kernel == "flash")
    assert bool(found["collectives"]) == (name == "h100:2")


def test_a_command_without_a_tpu_is_quiet():
    """With libtpu installed, which looks for a TPU and complains."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    code = (
        "from navit.cli import main; main(['convert', 'none', 'out']);"
        "import jax; jax.devices()"
    )
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0
    assert [x[:7] for x in done.stderr.splitlines()] == ["navit: "]


def test_mesh_axes_may_share_a_side_of_a_slice():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    code = (
        "from navit.compile import topology; topology.prepare();"
        "from navit.config import MeshConfig; from navit.sharding import make_mesh;"
        "devices = topology.devices('v6e:4x4');"
        "print(*(dict(make_mesh(MeshConfig(*axes), devices)[0].shape)"
        " for axes in ((1, 8, 2), (2, 8, 1), (4, 2, 2))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.count("'fsdp': 8") == 2, done.stderr


def compile_quickstart(tmp_path, *options, topology="v5e:2x2"):
    if topology == "v5e:2x2":
        pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    out = tmp_path / "found.json"
    small = ("data.row_tokens=256", "data.budgets=64,256", "data.slots=4")
    code = "import sys; from navit.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "compile", "configs/quickstart.py"]
    done = subprocess.run(
        [*command, "--topology", topology, "--quick", "--json", out, *small, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode in (0, 1), done.stderr
    return done, json.loads(out.read_text())


@pytest.mark.parametrize(
    "gradients", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def test_a_step_compiles_for_a_slice(tmp_path, gradients):
    """It fits; weights are gathered in bfloat16; no activation ever moves."""
    mesh = ("mesh.data=1", "mesh.fsdp=4", f"mesh.gradients={gradients}")
    done, (found,) = compile_quickstart(tmp_path, "data.rows=8", *mesh)
    assert done.returncode == 0, done.stdout
    assert found["fits"] and 0 < found["memory"]["peak"] < found["memory"]["limit"]
    assert found["quick"] and found["milliseconds"] is None
    assert "no times: leave out --quick" in done.stdout
    memory = found["memory"]
    known = sum(memory[x] for x in ("parameters", "optimizer", "batches"))
    assert memory["peak"] == pytest.approx(known + memory["activations"], rel=0.02)
    rows, tokens, texts = 2, 256, 24
    for each in found["collectives"]:
        shape = each["shape"]
        assert shape[:2] != [rows, tokens] and texts not in shape, each
        if len(shape) >= 2 and min(shape[-2:]) >= 128:
            reduced = each["kind"] in ("all-reduce", "reduce-scatter")
            # The position table's gradient is a product of its own, in float32.
            expected = {gradients, "float32"} if reduced else {"bfloat16"}
            names = {"bf16": "bfloat16", "f32": "float32"}
            assert names[each["dtype"]] in expected, each
    # Gradients of 128 x 128 projections are summed on the devices that own the shards.
    dtype = {"float32": "f32", "bfloat16": "bf16"}[gradients]
    sums = [x for x in found["collectives"] if x["kind"] != "all-gather"]
    scattered = [x for x in sums if x["shape"] == [128, 128]]
    assert {(x["kind"], x["dtype"]) for x in scattered} == {("reduce-scatter", dtype)}


class _TooLarge:
    def compile(self, compiler_options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17.2G of 15.75G hbm")


def test_a_program_that_does_not_fit_is_reported():
    program = Program(
        lowered=_TooLarge(),
        counts=flops.Counts(),
        flops=flops.Flops(),
        rows=8,
        row_tokens=256,
        visited=None,
        devices=4,
        device_kind="TPU v5 lite",
        parameters=2**20,
        optimizer=2**21,
        batch=2**20,
    )
    found = compile_program(program, "v5e:2x2", dump=None)
    assert not found.fits and found.memory["parameters"] == 1
    assert "does NOT fit in 15.75 GiB\nRESOURCE_EXHAUSTED: 17.2G" in table(found)
