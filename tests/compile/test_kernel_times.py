import pytest

from navit.compile.kernel_times import Kernel, kernel_cycles

# The compiler's output, abridged: 10 steps in 12 turns of 12 bundles, of which the
# first and the last jump over the body (0x4 to 0xa), and a branch of three bundles.
STATIC = """\
LB: loop body
= control target key end

     0   :  { %s1 = inlined_call_operand.hbm [shape: bf16[8]] } \
/* entry bundle: %splash_fwd.1 = custom-call(%bitcast.17, %bitcast.18) */
   0x1   :  { %s2 = smov 0 /* copy for cssa */ } /* Start region 9 */
   0x2 LB: > { %s3 = sadd.s32 1 /* iteration index, stage = 1 */ } /* Start region 3 */
   0x3   : > { %s5 = sadd.s32 2, %s4 /* iteration index, stage = 2 */ \
 ;;  %383 = sbr.rel (%p27_p2) target = $region40 }
   0x4   : > { %23 = dma.hbm_to_vmem [thread:$0]  (!%p27_p0), /*hbm=*/%s326_s13
base_bounds: (16, 12, 128, 1)
element_size_in_bytes: 2048
second_minor_factor: 1 */ } /* Start region 37 :: End region 37 :: Start region 38 */
   0x5   : > { %9 = sbr.rel (%p9) target = $region50 }
   0x6   :  {}
   0x7   : > { %v1 = vld [vmem:[#allocation2]] }
   0x8   : > { %v2 = vpow2.f32 %v1 }
   0x9   : > { %v3 = vst %v2 } /* Start/End empty region 50 */
   0xa   : > { %v4 = vst %v3 } /* End region 38 */
   0xb PF: > { %s6 = sand.u32 1, %s5 } /* Start/End empty region 40 */
   0xc   : > { %p8_p9 = scmp.ge.s32.totalorder %s3, 12 /* loop exit test */ }
   0xd   : > { %29 = sbr.rel (!%p8_p9) target = $region3 }
   0xe   :  { %30 = vsyncpa [#allocation6], 1 } /* exit bundle: %splash_fwd.1 = ... */
"""


def write(folder, text, name="splash_fwd.1-72-final_bundles.txt"):
    (folder / f"1795259598-{name}").write_text(text)


def test_bundles_of_the_grid_loop(tmp_path):
    write(tmp_path, STATIC)
    write(tmp_path, "", "splash_fwd.1-71-schedule-analysis_final_bundles.txt")
    write(tmp_path, STATIC.replace("custom-call", "fusion"), "x-66-final_bundles.txt")
    assert kernel_cycles(tmp_path) == {"splash_fwd.1": Kernel(12, 10, 2, 7, (3,), 3)}


def test_cycles_of_a_static_grid(tmp_path):
    write(tmp_path, STATIC)
    (kernel,) = kernel_cycles(tmp_path).values()
    assert kernel.cycles() == 3 + 2 * 5 + 10 * 12
    assert kernel.cycles(taken=[0.5]) == 3 + 2 * 5 + 10 * 10.5
    with pytest.raises(ValueError, match="2 shares for 1 branches"):
        kernel.cycles(taken=[1, 1])


def test_a_dynamic_grid_needs_its_steps(tmp_path):
    text = STATIC.replace("12 /* loop exit test */", "%s10")
    write(tmp_path, text)
    (kernel,) = kernel_cycles(tmp_path).values()
    assert kernel.steps is None
    assert kernel.cycles(10) == 3 + 2 * 5 + 10 * 12
    with pytest.raises(ValueError, match="how many steps"):
        kernel.cycles()


def test_a_loop_within_a_step_counts_as_often_as_it_runs(tmp_path):
    text = STATIC.replace("   0x7   : > {", "   0x7 LB: >> {")
    text = text.replace("vmem:[#allocation2]] }", "vmem:[%a]] } /* Start region 60 */")
    text = text.replace(
        "%v2 = vpow2.f32 %v1 }",
        "%p1 = scmp.ge.s32.totalorder %s4, 5 /* loop exit test */ "
        ";; %2 = sbr.rel (!%p1) target = $region60 }",
    )
    write(tmp_path, text)
    (kernel,) = kernel_cycles(tmp_path).values()
    assert kernel == Kernel(12 + 4 * 2, 10, 2, 7 + 4 * 2, (3 + 4 * 2,), 3)


def test_a_kernel_with_no_loop_runs_once(tmp_path):
    lines = STATIC.splitlines(keepends=True)
    write(tmp_path, "".join(x for x in lines if "region3 }" not in x))
    (kernel,) = kernel_cycles(tmp_path).values()
    assert kernel == Kernel(15, 1, 0, 15, (), 0)
    assert kernel.cycles() == 15
