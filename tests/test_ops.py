"""The kernels against the reference: the same random words, the same tokens, latents to rounding; on every backend."""

import os
import subprocess
import sys

import pytest
import torch

from cadd_min import ops
from cadd_min.kernels import philox
from cadd_min.reverse import ZHATS, Decoding, draw, step_coefficients, token_probs
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.errors import InputError
from tests.toys import ALPHA, ROOT, rng

# On a machine with a GPU and CUDA kernels the whole of this file runs there (make gpu-check).
DEVICE = "cuda" if ops.backend().name == "cuda" else "cpu"
SEED = torch.tensor([-1234567890123, 42], device=DEVICE)
compiled = pytest.mark.skipif(ops.backend().name == "torch", reason=ops.backend().why)


def test_philox_known_answers():
    """The vectors that come with Random123 (kat_vectors, philox4x32 10)."""
    f = 2**32 - 1
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for key, counter, expected in (
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (f, f, f, f), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (0x299F31D0A4093822, pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        words = philox.philox(torch.tensor(key), tuple(torch.tensor(c) for c in counter))
        assert tuple(int(w) for w in words) == expected
        if ops.compiled is not None:
            assert ops.compiled.philox(key % 2**64, *counter) == expected


def test_normals_are_normal_and_independent():
    """Kolmogorov-Smirnov on 400,000; no correlation between elements, positions, or offsets beyond 5 / sqrt(n)."""
    stats = pytest.importorskip("scipy.stats")
    seed, position = SEED.cpu(), torch.arange(100_000)
    eps = philox.normals(seed, position, 4)
    assert stats.kstest(eps.flatten().numpy(), "norm").pvalue > ALPHA
    other = philox.normals(seed + torch.tensor([0, 1]), position, 4)
    for a, b in ((eps[:, 0], eps[:, 1]), (eps[:, 2], eps[:, 3]), (eps[1:, 0], eps[:-1, 0]), (eps, other)):
        assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5


def noising_case(shape, vocab, dim, dtype=torch.float32):
    x_0 = torch.randint(vocab, shape, generator=rng(0))
    ids = torch.randint(vocab, shape, generator=rng(1))
    table = torch.randn(vocab, dim, generator=rng(2)).to(dtype)
    t = torch.linspace(0, 1, shape[0], dtype=torch.float64)
    return x_0.to(DEVICE), ids.to(DEVICE), table.to(DEVICE), t.to(DEVICE)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("continuous", ["linear", "flow"])
@pytest.mark.parametrize("shape, vocab, dim", [((3, 7), 5, 3), ((4, 1), 2, 1), ((2, 64), 50258, 64), ((5, 33), 17, 768),
                                               ((0, 4), 3, 2), ((3, 0), 3, 2), ((3, 5), 4, 0)])  # fmt: skip
def test_forward_noising_matches_the_reference(shape, vocab, dim, continuous, dtype):
    x_0, ids, table, t = noising_case(shape, vocab, dim, dtype)
    schedule = NoiseSchedule("linear", continuous)
    clock = torch.stack([schedule.alpha(t), schedule.signal(t), schedule.noise(t)], -1)
    x_t, z_t = ops.forward_noising(x_0, ids, table, t, schedule, vocab, SEED)
    z_ref, x_ref = ops.REFERENCE["forward_noising"](x_0, ids, table, clock, SEED, vocab)
    assert torch.equal(x_t, x_ref) and z_t.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 2e-6)
    torch.testing.assert_close(z_t, z_ref, rtol=tolerance, atol=tolerance)
    kept = x_t != vocab
    assert torch.equal(z_t[kept], table[ids][kept])  # Prop. 1: exactly z_0


def reverse_case(latents, count, vocab, dim, spread=3.0, dtype=torch.float32):
    positions = count + 3
    logits = (spread * torch.randn(latents, count, vocab, generator=rng(0))).to(dtype)
    rows = torch.randperm(positions, generator=rng(1))[:count].sort().values
    z_t = torch.randn(latents, positions, dim, generator=rng(2))
    table = torch.randn(vocab + 1, dim, generator=rng(3))
    s, t = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    step = step_coefficients(s, t, NoiseSchedule())
    return tuple(tensor.to(DEVICE) for tensor in (logits, rows, z_t, table, step))


def reference(logits, rows, z_t, table, step, mask_id, seed, decoding=Decoding()):  # noqa: B008
    zhat = ZHATS.index(decoding.zhat)
    return ops.REFERENCE["reverse_step"](logits.float(), rows, z_t, table, step, seed, mask_id, zhat, *decoding[1:])


@compiled
@pytest.mark.parametrize("zhat", ZHATS)
@pytest.mark.parametrize("latents", [1, 2, 5])
@pytest.mark.parametrize("count, vocab, dim, top_p", [(0, 3, 2, 1.0), (1, 2, 1, 1.0), (40, 3, 3, 0.7), (40, 17, 64, 1.),
    (40, 999, 64, 0.9), (7, 256, 3, 0.5), (7, 257, 0, 0.9), (5, 50258, 768, 1.0), (5, 50258, 8, 0.9)])  # fmt: skip
def test_reverse_step_matches_the_reference(latents, count, vocab, dim, top_p, zhat):
    case = (*reverse_case(latents, count, vocab, dim), vocab, SEED)
    decoding = Decoding(zhat, 0.8, top_p)
    (x_s, z_s), (x_ref, z_ref) = ops.reverse_step(*case, decoding), reference(*case, decoding)
    assert torch.equal(x_s, x_ref)
    edge = 2e-4 if top_p < 1 and zhat == "soft" else 1e-5  # the least of 50,000 tokens may be in the nucleus or out
    torch.testing.assert_close(z_s, z_ref, rtol=1e-4, atol=edge)


@pytest.mark.parametrize("dim", [0, 8])
@pytest.mark.parametrize("zhat", ZHATS)
def test_groups_of_positions_make_the_step_of_all(zhat, dim):
    """Two groups that share a step each, by the kernel if built: the step of all positions with their own, by the
    reference. What flips is what was told."""
    logits, rows, z_t, table, _ = reverse_case(2, 40, 17, dim)
    flips = (torch.arange(40) % 3 == 0).to(DEVICE)
    s, t, schedule = *torch.tensor([0.5, 0.8], dtype=torch.float64, device=DEVICE), NoiseSchedule()
    own = step_coefficients(s.expand(40), t.expand(40), schedule, flips.double())  # (4, N)
    x_ref, z_ref = ops.reverse_step(logits, rows, z_t, table, own, 17, SEED, Decoding(zhat))
    assert torch.equal(x_ref != 17, flips)
    for some, rho in ((flips, 1.0), (~flips, 0.0)):
        step = step_coefficients(s, t, schedule, torch.full_like(s, rho))
        x_s, z_s = ops.reverse_step(logits[:, some], rows[some], z_t, table, step, 17, SEED, Decoding(zhat))
        assert torch.equal(x_s, x_ref[some])
        torch.testing.assert_close(z_s, z_ref[:, some], rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_id", [0, 300, 511])
def test_reverse_step_in_half_precision_and_with_the_mask_among_the_logits(mask_id, dtype):
    logits, *rest = reverse_case(2, 30, 512, 8, dtype=dtype)
    logits[..., mask_id] = 60.0  # by far the largest, and never drawn
    case = (logits, *rest, mask_id, SEED)
    for zhat in ZHATS:
        (x_s, z_s), (x_ref, z_ref) = ops.reverse_step(*case, Decoding(zhat)), reference(*case, Decoding(zhat))
        assert torch.equal(x_s, x_ref) and (x_s != mask_id).any()
        torch.testing.assert_close(z_s, z_ref, rtol=1e-4, atol=1e-5)


def test_strided_inputs_give_the_same():
    logits, rows, z_t, table, *rest = reverse_case(3, 20, 40, 6)
    mess = (logits.transpose(0, 2).contiguous().transpose(0, 2), rows.repeat_interleave(2)[::2],
            z_t.transpose(0, 2).contiguous().transpose(0, 2), torch.cat([table, table], 1)[:, :6])  # fmt: skip
    for zhat in ZHATS:
        a = ops.reverse_step(logits, rows, z_t, table, *rest, 40, SEED, Decoding(zhat))
        b = ops.reverse_step(*mess, *rest, 40, SEED, Decoding(zhat))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    x_0, ids, table, t = noising_case((4, 9), 40, 6)
    a = ops.forward_noising(x_0, ids, table, t, NoiseSchedule(), 40, SEED)
    b = ops.forward_noising(
        x_0.T.contiguous().T, ids, torch.cat([table, table], 1)[:, :6], t, NoiseSchedule(), 40, SEED
    )
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_threads_change_nothing():
    case, noising = (
        (*reverse_case(2, 64, 999, 32), 999, SEED),
        (*noising_case((8, 128), 99, 32), NoiseSchedule(), 99, SEED),
    )
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                [*(t for z in ZHATS for t in ops.reverse_step(*case, Decoding(z))), *ops.forward_noising(*noising)]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def drawn(logits: torch.Tensor, count: int, seed: int, **options) -> torch.Tensor:
    """Counts of the tokens that `count` rows with these logits (V,) turn into."""
    vocab, total, chunk = len(logits), torch.zeros(len(logits), dtype=torch.int64), 20_000
    last = step_coefficients(*torch.tensor([0, 1], dtype=torch.float64, device=DEVICE), NoiseSchedule())
    rows, nothing = torch.arange(chunk, device=DEVICE), torch.zeros(1, chunk, 0, device=DEVICE)
    logits = logits.to(DEVICE).expand(1, chunk, -1)
    for i in range(count // chunk):
        x, _ = ops.reverse_step(logits, rows, nothing, nothing.new_zeros(vocab, 0), last, vocab,
                                torch.tensor([seed, i], device=DEVICE), Decoding(**options))  # fmt: skip
        total += torch.bincount(x.cpu(), minlength=vocab)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_draws_have_their_law_in_the_tail(top_p):
    """10^6 draws over 1,000 tokens, rates from 1e-2 to 1e-7: chi-square where 5 and more are expected, z-scores of the
    tail together, nothing from outside. Power: a law with every rate below 1e-4 gone is caught."""
    stats = pytest.importorskip("scipy.stats")
    logits = torch.linspace(0, -11.5, 1000)
    law = token_probs(logits.expand(1, 1, -1), 1000, 1.0, top_p)[0].double()
    counts = drawn(logits, 1_000_000, 5, top_p=top_p)
    assert counts.sum() == 1_000_000 and counts[law == 0].sum() == 0
    expected = law * 1_000_000
    common = expected >= 5
    rest = [counts[~common].sum().item()], [expected[~common].sum().item()]
    ok = lambda f: stats.chisquare([*f[common].tolist(), *rest[0]] if rest[1][0] else f[common].tolist(),
                                   [*expected[common].tolist(), *rest[1]] if rest[1][0] else expected[common].tolist(),
                                   sum_check=False).pvalue > ALPHA  # fmt: skip
    assert ok(counts.double())
    if top_p == 1.0:
        tail = expected < 100
        z = (counts[tail].sum() - expected[tail].sum()) / expected[tail].sum() ** 0.5
        assert abs(float(z)) < 4
        assert not ok(torch.where(expected < 100, 0, counts).double())


def test_a_token_of_rate_1e_7_is_reached_and_one_of_rate_0_is_not():
    """By its uniform: the CDF's last 1e-7 belongs to the last token, whatever surrounds it."""
    p = torch.full((600,), 1e-7, dtype=torch.float64)
    p[0], p[300] = 1 - 1e-7 * 598, 0.0
    seen = draw(p.float()[None].expand(3, -1), torch.tensor([1 - 0.5e-7, 0.0, 1 - 2**-53]))
    assert seen.tolist() == [599, 0, 599]


@pytest.mark.parametrize("logits, expected", [
    ([1e4, -1e4, 0.0], {0}), ([-1e4, -1e4, -1e4], {0, 1, 2}), ([-torch.inf, -torch.inf, 3.0], {2}),
    ([0.0] * 300, set(range(300))), ([-torch.inf] * 299 + [-1e4], {299}), ([-1e30, -2e30], {0})])  # fmt: skip
def test_extreme_logits(logits, expected):
    assert set(drawn(torch.tensor(logits), 20_000, 1).nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("zhat", ZHATS)
def test_rows_without_a_law_are_refused(bad, zhat):
    logits, *rest = reverse_case(2, 5, 300, 4)
    logits[1, 3, :] = bad
    with pytest.raises(ValueError, match=r"NaN"):
        ops.reverse_step(logits, *rest, 300, SEED, Decoding(zhat))


@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assertion there, which ends the process")
def test_ids_beyond_the_table_are_refused():
    x_0, ids, table, t = noising_case((2, 5), 7, 3)
    with pytest.raises(IndexError):
        ops.forward_noising(x_0, ids + 7, table, t, NoiseSchedule(), 7, SEED)


@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assertion there, which ends the process")
def test_rows_beyond_the_latents_are_refused():
    logits, rows, *rest = reverse_case(2, 5, 30, 4)
    for bad in (rows + 10**9, rows - 10):
        with pytest.raises((IndexError, RuntimeError)):  # the kernel, the reference
            ops.reverse_step(logits, bad, *rest, 30, SEED)


def noising_arguments(dtype=torch.float64, grad=True):
    x_0, ids, table, t = noising_case((3, 6), 5, 3, dtype)
    schedule = NoiseSchedule()
    clock = torch.stack([schedule.alpha(t), schedule.signal(t), schedule.noise(t)], -1)
    return x_0, ids, table.requires_grad_(grad), clock, SEED, 5


def test_gradient_to_the_table():
    x_0, ids, table, *rest = noising_arguments()
    assert torch.autograd.gradcheck(lambda w: torch.ops.cadd_min.forward_noising(x_0, ids, w, *rest)[0], table)


def test_operators_pass_opcheck():
    torch.library.opcheck(torch.ops.cadd_min.forward_noising, noising_arguments(torch.float32))
    logits, rows, z_t, table, _ = reverse_case(2, 5, 30, 4)
    step = torch.tensor([0.3, 0.2, 0.7, 0.4], dtype=torch.float64, device=DEVICE)
    for zhat in range(3):
        torch.library.opcheck(
            torch.ops.cadd_min.reverse_step, (logits, rows, z_t, table, step, SEED, 30, zhat, 1.0, 0.9)
        )


@pytest.mark.slow
def test_compile_sees_one_graph():
    def noising(x_0, table, t, seed):
        return ops.forward_noising(x_0, x_0, table, t, NoiseSchedule(), 5, seed)[1] * 2

    x_0, _, table, t = noising_case((3, 6), 5, 3)
    torch.testing.assert_close(
        torch.compile(noising, fullgraph=True)(x_0, table, t, SEED), noising(x_0, table, t, SEED)
    )

    def step(logits, rows, z_t, table, step, seed):
        return ops.reverse_step(logits + 0, rows, z_t, table, step, 30, seed, Decoding("soft"))[1] * 2

    case = reverse_case(2, 5, 30, 4)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*case, SEED), step(*case, SEED))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_backend_says_what_runs_and_why():
    name, why = ops.backend()
    assert name in ("cuda", "cpp", "torch") and why
    code = "from cadd_min import ops; print(ops.backend().name)"
    assert run_python(code, CADD_BACKEND="torch").stdout.strip() == "torch"
    assert "must be one of" in run_python(code, CADD_BACKEND="tpu").stderr


def test_a_backend_that_is_none_is_a_sentence(tmp_path):
    for command in (["-m", "cadd_min.ops"], ["train_text.py", "--steps", "1", "--out", str(tmp_path / "run")]):
        environment = {**os.environ, "CADD_BACKEND": "tpu"}
        found = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert found.returncode == 2 and "Traceback" not in found.stderr
        assert found.stderr.endswith("error: CADD_BACKEND must be one of auto, torch, cpp, cuda, not 'tpu'\n")
    assert not (tmp_path / "run").exists()


def test_the_door_says_what_is_active():
    found = subprocess.run([sys.executable, "-m", "cadd_min.ops"], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith(f"{ops.backend().name}: ")
    assert ("self-test passed" in found.stdout) == (ops.compiled is not None)


def test_temperature_zero_takes_the_largest_logit_but_never_the_mask():
    logits, rows, z_t, table, step = reverse_case(2, 30, 50, 4)
    logits[..., 7], step[0] = 60.0, 1.0  # the last step: all flip
    x_s, _ = ops.reverse_step(logits[:1], rows, z_t[:1], table, step, 7, SEED, Decoding(temperature=0))
    assert torch.equal(x_s, logits[0].index_fill(-1, torch.tensor([7], device=DEVICE), -torch.inf).argmax(-1))


def test_a_backend_asked_for_is_never_replaced():
    """Without its shared library, CADD_BACKEND=cpp is an error that says how to build it."""
    code = (
        "import sys; sys.modules['cadd_min._C'] = None\n"
        "import cadd_min.kernels.build as b; b.CSRC = b.CSRC / 'none'\nimport cadd_min.ops as o; o.backend()"
    )
    found = run_python(code, CADD_BACKEND="cpp")
    assert found.returncode != 0 and "pip install" in found.stderr
    assert run_python(code, CADD_BACKEND="auto").returncode == 0


def test_reference_and_kernel_draw_the_same_samples():
    """The whole chain, by the backend that is active and by the reference in another process."""
    code = (
        "import torch\nfrom tests.toys import nano, rng\nfrom tests.toys import chain\nnet = nano()\n"
        "torch.nn.init.normal_(net.head.weight, generator=rng(5))\n"
        "for z in ('hard', 'soft', 'sample'):\n"
        "    print(chain(net, (4, 12), net.table(), net.schedule, 11, steps=6, zhat=z, num_latents=2, top_p=.95, "
        "generator=rng(1)).tolist())"
    )
    found = {name: run_python(code, CADD_BACKEND=name) for name in ("auto", "torch")}
    assert found["auto"].returncode == 0, found["auto"].stderr
    assert found["auto"].stdout == found["torch"].stdout and len(found["auto"].stdout) > 300


def test_errors_name_the_argument():
    with pytest.raises(InputError, match="zhat"):
        ops.reverse_step(*reverse_case(1, 2, 5, 3), 5, SEED, Decoding("mushy"))
