"""The fused kernels against the reference in PyTorch: the same tokens, and latents to rounding, on every backend.

Random numbers and draws have their law, by chi-square in the tail: counts without the tail must fail. On a machine with
CUDA kernels the whole file runs on the GPU (make gpu-check).
"""

import os
import subprocess
import sys
import types

import pytest
import torch

from cadd_min import ops
from cadd_min.kernels import philox
from cadd_min.kernels.register import INSTALL
from cadd_min.reverse import COLD, ZHATS, Decoding, draw, step_coefficients, token_probs
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.errors import InputError
from tests.toys import ALPHA, ROOT, rng

DEVICE = "cuda" if ops.backend().name == "cuda" else "cpu"
SEED = torch.tensor([-1234567890123, 42], device=DEVICE)
compiled = pytest.mark.skipif(ops.backend().name == "torch", reason=ops.backend().why)


def test_philox_known_answers():
    """Compare with the known answers of Random123 (kat_vectors, philox4x32 10), in PyTorch and in the kernels."""
    f, pi = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
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
    """Compare with N(0, 1) by Kolmogorov-Smirnov. Elements, positions, offsets must not correlate above 5 / sqrt(n)."""
    stats = pytest.importorskip("scipy.stats")
    seed, position = SEED.cpu(), torch.arange(100_000)
    eps = philox.normals(seed, position, 4)
    assert stats.kstest(eps.flatten().numpy(), "norm").pvalue > ALPHA
    next_offset = philox.normals(seed + torch.tensor([0, 1]), position, 4)
    for a, b in ((eps[:, 0], eps[:, 1]), (eps[:, 2], eps[:, 3]), (eps[1:, 0], eps[:-1, 0]), (eps, next_offset)):
        assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5


def noising_case(shape, vocab, dim, dtype=torch.float32):
    """Make x_0 and ids of `shape` (B, L), table (V, D) and t (B,) for `forward_noising`."""
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
    """Compare tokens bit for bit and latents to the dtype's rounding, from empty batches to the paper's sizes."""
    x_0, ids, table, t = noising_case(shape, vocab, dim, dtype)
    schedule = NoiseSchedule("linear", continuous)
    x_t, z_t = ops.forward_noising(x_0, ids, table, t, schedule, vocab, SEED)
    coefficients = torch.stack([schedule.alpha(t), schedule.signal(t), schedule.noise(t)], -1)  # (B, 3)
    z_ref, x_ref = ops.REFERENCE["forward_noising"](x_0, ids, table, coefficients, SEED, vocab)
    assert torch.equal(x_t, x_ref) and z_t.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 2e-6)
    torch.testing.assert_close(z_t, z_ref, rtol=tolerance, atol=tolerance)
    unmasked = x_t != vocab
    assert torch.equal(z_t[unmasked], table[ids][unmasked])  # Prop. 1: exactly z_0


def reverse_case(latents, count, vocab, dim, spread=3.0, dtype=torch.float32):
    """Make logits (K, N, V), rows (N,), z_t (K, N + 3, D), table (V + 1, D) and step (4,) for `reverse_step`."""
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
    """Compare tokens bit for bit and latents to rounding, for every z0_hat, with top-p and without."""
    case = (*reverse_case(latents, count, vocab, dim), vocab, SEED)
    decoding = Decoding(zhat, 0.8, top_p)
    (x_s, z_s), (x_ref, z_ref) = ops.reverse_step(*case, decoding), reference(*case, decoding)
    assert torch.equal(x_s, x_ref)
    tolerance = 2e-4 if top_p < 1 and zhat == "soft" else 1e-5  # rounding decides what is last in the nucleus
    torch.testing.assert_close(z_s, z_ref, rtol=1e-4, atol=tolerance)


def test_an_ordinary_step_goes_to_the_active_backend(monkeypatch):
    """Check which calls go to the reference directly: float64, and temperatures up to COLD."""
    direct = []

    def recorded(*arguments):
        direct.append(arguments)
        return ops.REFERENCE["reverse_step"](*arguments)

    monkeypatch.setattr(ops, "_reverse_step", recorded)
    logits, rows, z_t, table, step = reverse_case(1, 5, 7, 2)

    def taken(logits=logits, temperature=1.0):
        direct.clear()
        ops.reverse_step(logits, rows, z_t, table, step, 7, SEED, Decoding("hard", temperature))
        return len(direct)

    assert taken() == 0 and taken(temperature=2 * COLD) == 0
    assert taken(temperature=COLD) == 1 and taken(logits.double()) == 1


@pytest.mark.parametrize("dim", [0, 8])
@pytest.mark.parametrize("zhat", ZHATS)
def test_groups_of_positions_make_the_step_of_all(zhat, dim):
    """Compare two groups with one step each with a step per position."""
    logits, rows, z_t, table, _ = reverse_case(2, 40, 17, dim)
    flips = (torch.arange(40) % 3 == 0).to(DEVICE)
    s, t, schedule = *torch.tensor([0.5, 0.8], dtype=torch.float64, device=DEVICE), NoiseSchedule()
    steps = step_coefficients(s.expand(40), t.expand(40), schedule, flips.double())  # (4, N)
    x_ref, z_ref = ops.reverse_step(logits, rows, z_t, table, steps, 17, SEED, Decoding(zhat))
    assert torch.equal(x_ref != 17, flips)
    for group, rho in ((flips, 1.0), (~flips, 0.0)):
        step = step_coefficients(s, t, schedule, torch.full_like(s, rho))
        x_s, z_s = ops.reverse_step(logits[:, group], rows[group], z_t, table, step, 17, SEED, Decoding(zhat))
        assert torch.equal(x_s, x_ref[group])
        torch.testing.assert_close(z_s, z_ref[:, group], rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("count", [0, 1, 40])
@pytest.mark.parametrize("zhat, top_p", [("hard", 1.0), ("soft", 0.8), ("sample", 0.8)])
def test_a_step_for_each_position_is_the_reference(zhat, top_p, count):
    """Give each position its own times, which no other position has, so that a column for a wrong row is seen."""
    logits, rows, z_t, table, _ = reverse_case(2, count, 17, 8)
    t = torch.linspace(0.3, 1, count, dtype=torch.float64, device=DEVICE)
    steps = step_coefficients(t * t, t, NoiseSchedule())
    case = (logits, rows, z_t, table, steps, 17, SEED, Decoding(zhat, 1.0, top_p))
    (x_s, z_s), (x_ref, z_ref) = ops.reverse_step(*case), reference(*case)
    assert torch.equal(x_s, x_ref) and (count < 40 or 0 < (x_s == 17).sum() < count)
    torch.testing.assert_close(z_s, z_ref, rtol=1e-4, atol=1e-5)


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
    strided = (logits.transpose(0, 2).contiguous().transpose(0, 2), rows.repeat_interleave(2)[::2],
               z_t.transpose(0, 2).contiguous().transpose(0, 2), torch.cat([table, table], 1)[:, :6])  # fmt: skip
    for zhat in ZHATS:
        a = ops.reverse_step(logits, rows, z_t, table, *rest, 40, SEED, Decoding(zhat))
        b = ops.reverse_step(*strided, *rest, 40, SEED, Decoding(zhat))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    x_0, ids, table, t = noising_case((4, 9), 40, 6)
    a = ops.forward_noising(x_0, ids, table, t, NoiseSchedule(), 40, SEED)
    strided = x_0.T.contiguous().T, ids, torch.cat([table, table], 1)[:, :6]
    b = ops.forward_noising(*strided, t, NoiseSchedule(), 40, SEED)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_threads_change_nothing():
    """Compare one, two and three threads bit for bit: random numbers belong to a position, not to a thread."""
    reverse = *reverse_case(2, 64, 999, 32), 999, SEED
    noising = *noising_case((8, 128), 99, 32), NoiseSchedule(), 99, SEED
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            stepped = [t for z in ZHATS for t in ops.reverse_step(*reverse, Decoding(z))]
            results.append([*stepped, *ops.forward_noising(*noising)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for tensors in results[1:] for a, b in zip(results[0], tensors))


def drawn(logits: torch.Tensor, count: int, seed: int, **options) -> torch.Tensor:
    """Count the tokens (V,) that the last reverse step draws in `count` rows of these logits (V,)."""
    vocab, total, chunk = len(logits), torch.zeros(len(logits), dtype=torch.int64), 20_000
    last = step_coefficients(*torch.tensor([0, 1], dtype=torch.float64, device=DEVICE), NoiseSchedule())
    rows, no_latents = torch.arange(chunk, device=DEVICE), torch.zeros(1, chunk, 0, device=DEVICE)
    logits = logits.to(DEVICE).expand(1, chunk, -1)
    for i in range(count // chunk):
        x, _ = ops.reverse_step(logits, rows, no_latents, no_latents.new_zeros(vocab, 0), last, vocab,
                                torch.tensor([seed, i], device=DEVICE), Decoding(**options))  # fmt: skip
        total += torch.bincount(x.cpu(), minlength=vocab)
    return total


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Compute the p-value of counts (V,). Tokens expected fewer than 5 times share one cell."""
    stats = pytest.importorskip("scipy.stats")
    both, common = torch.stack([counts.double(), expected]), expected >= 5
    rare = both[:, ~common].sum(1, keepdim=True)  # (2, 1)
    cells = torch.cat([both[:, common], rare], 1) if rare[1] > 0 else both[:, common]  # (2, cells)
    return stats.chisquare(*cells.numpy(), sum_check=False).pvalue


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_draws_have_their_law_in_the_tail(top_p):
    """Compare 10^6 draws over 1,000 tokens, of rates from 1e-2 to 1e-7, with their law by chi-square.

    Tokens outside the nucleus must never be drawn. All tokens of rates below 1e-4 together must have their number to
    four standard errors. Power: counts without these tokens are caught.
    """
    logits = torch.linspace(0, -11.5, 1000)
    law = token_probs(logits.expand(1, 1, -1), 1000, 1.0, top_p)[0].double()
    counts = drawn(logits, 1_000_000, 5, top_p=top_p)
    assert counts.sum() == 1_000_000 and counts[law == 0].sum() == 0
    expected = law * 1_000_000
    assert chi_square(counts, expected) > ALPHA
    if top_p == 1.0:
        tail = expected < 100
        z = (counts[tail].sum() - expected[tail].sum()) / expected[tail].sum() ** 0.5
        assert abs(float(z)) < 4
        assert chi_square(torch.where(tail, 0, counts), expected) < ALPHA


def test_a_token_of_rate_1e_7_is_reached_and_one_of_rate_0_is_not():
    """Draw by chosen uniforms: the last 1e-7 of the CDF is the last token's, whatever surrounds it."""
    p = torch.full((600,), 1e-7, dtype=torch.float64)
    p[0], p[300] = 1 - 1e-7 * 598, 0.0
    tokens = draw(p.float()[None].expand(3, -1), torch.tensor([1 - 0.5e-7, 0.0, 1 - 2**-53]))
    assert tokens.tolist() == [599, 0, 599]


@pytest.mark.parametrize("logits, expected", [
    ([1e4, -1e4, 0.0], {0}), ([-1e4, -1e4, -1e4], {0, 1, 2}), ([-torch.inf, -torch.inf, 3.0], {2}),
    ([0.0] * 300, set(range(300))), ([-torch.inf] * 299 + [-1e4], {299}), ([-1e30, -2e30], {0})])  # fmt: skip
def test_extreme_logits(logits, expected):
    """Check which tokens are drawn where exp overflows, underflows or is zero for all tokens but one."""
    assert set(drawn(torch.tensor(logits), 20_000, 1).nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("latents", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_nucleus_keeps_every_token_as_probable_as_its_last(dtype, latents):
    """Half-precision logits have many ties, over the whole row. z_s is p itself: the table is the identity.

    The nucleus is found by its definition in float64, where equal logits have equal probabilities.
    """
    vocab, count, top_p = 700, 40, 0.8
    one = (3 * torch.randn(1, count, vocab, generator=rng(3))).to(torch.bfloat16).to(dtype)
    logits = one.expand(latents, -1, -1).contiguous()
    p = one[0].double().softmax(-1)
    falling = p.sort(-1, descending=True).values
    last = falling.gather(1, (falling.cumsum(-1) < top_p).sum(-1, keepdim=True))
    table, z_t = torch.eye(vocab), torch.zeros(latents, count, vocab)
    coefficients = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)  # no flip, z_s = z0_hat
    arguments = (logits, torch.arange(count), z_t, table, coefficients)
    _, z_s = ops.reverse_step(*(a.to(DEVICE) for a in arguments), vocab, SEED, Decoding("soft", 1.0, top_p))
    assert torch.equal(z_s[0].cpu() > 0, p >= last)
    assert int((p == last).sum()) > count + 10  # there are ties


@pytest.mark.parametrize("zhat", ZHATS)
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_logit_of_the_mask_is_not_read_whatever_it_is(zhat, top_p):
    logits, *rest = reverse_case(2, 5, 300, 4)
    results = []
    for value in (0.0, torch.nan, torch.inf, -torch.inf):
        logits[..., 255] = value  # the mask is one of the V tokens, the last of a block
        results.append(ops.reverse_step(logits, *rest, 255, SEED, Decoding(zhat, 0.9, top_p)))
    for x_s, z_s in results[1:]:
        assert torch.equal(x_s, results[0][0]) and torch.equal(z_s, results[0][1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("zhat", ZHATS)
def test_rows_without_a_law_are_refused(bad, zhat):
    logits, *rest = reverse_case(2, 5, 300, 4)
    logits[1, 3, :] = bad
    with pytest.raises(ValueError, match=r"NaN"):
        ops.reverse_step(logits, *rest, 300, SEED, Decoding(zhat))


@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assertion there, which ends the process")
def test_ids_beyond_the_table_and_rows_beyond_the_latents_are_refused():
    x_0, ids, table, t = noising_case((2, 5), 7, 3)
    with pytest.raises(IndexError):
        ops.forward_noising(x_0, ids + 7, table, t, NoiseSchedule(), 7, SEED)
    logits, rows, *rest = reverse_case(2, 5, 30, 4)
    for bad in (rows + 10**9, rows - 10):
        with pytest.raises((IndexError, RuntimeError)):  # the kernel, the reference
            ops.reverse_step(logits, bad, *rest, 30, SEED)


def noising_arguments(dtype=torch.float64):
    x_0, ids, table, t = noising_case((3, 6), 5, 3, dtype)
    coefficients = torch.stack([1 - t, (1 - t).sqrt(), t.sqrt()], -1)  # (B, 3)
    return x_0, ids, table.requires_grad_(), coefficients, SEED, 5


def test_gradient_to_the_table():
    x_0, ids, table, *rest = noising_arguments()
    assert torch.autograd.gradcheck(lambda w: torch.ops.cadd_min.forward_noising(x_0, ids, w, *rest)[0], table)


def test_operators_pass_opcheck():
    torch.library.opcheck(torch.ops.cadd_min.forward_noising, noising_arguments(torch.float32))
    logits, rows, z_t, table, _ = reverse_case(2, 5, 30, 4)
    step = torch.tensor([0.3, 0.2, 0.7, 0.4], dtype=torch.float64, device=DEVICE)
    for zhat in range(3):
        arguments = (logits, rows, z_t, table, step, SEED, 30, zhat, 1.0, 0.9)
        torch.library.opcheck(torch.ops.cadd_min.reverse_step, arguments)


@pytest.mark.slow
def test_compile_sees_one_graph():

    def noising(x_0, table, t, seed):
        return ops.forward_noising(x_0, x_0, table, t, NoiseSchedule(), 5, seed)[1] * 2

    x_0, _, table, t = noising_case((3, 6), 5, 3)
    case = (x_0, table, t, SEED)
    torch.testing.assert_close(torch.compile(noising, fullgraph=True)(*case), noising(*case))

    def step(logits, rows, z_t, table, step, seed):
        return ops.reverse_step(logits + 0, rows, z_t, table, step, 30, seed, Decoding("soft"))[1] * 2

    case = reverse_case(2, 5, 30, 4)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*case, SEED), step(*case, SEED))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_backend_says_what_runs_and_why():
    name, why = ops.backend()
    assert name in ("cuda", "cpp", "torch") and why
    code = "from cadd_min import ops; print(ops.backend().name)"
    assert run_python(code, CADD_BACKEND="torch").stdout.strip() == "torch"
    assert "must be one of" in run_python(code, CADD_BACKEND="tpu").stderr


def test_a_backend_that_is_none_is_a_sentence(tmp_path):
    """Check that an unknown backend ends a command with one sentence and exit code 2, before anything is written."""
    for command in (["-m", "cadd_min.ops"], ["train_text.py", "--steps", "1", "--out", str(tmp_path / "run")]):
        environment = {**os.environ, "CADD_BACKEND": "tpu"}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.endswith("error: CADD_BACKEND must be one of auto, torch, cpp, cuda, not 'tpu'\n")
    assert not (tmp_path / "run").exists()


def test_the_door_says_what_is_active(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ops"])
    ops.main()
    name, reason = ops.backend()
    tested = "" if ops.compiled is None else "self-test passed\n"
    assert capsys.readouterr().out == f"{name}: {reason}\n{tested}"
    if ops.compiled is not None:
        monkeypatch.setattr(ops, "compiled", types.SimpleNamespace(self_test=lambda: False))
        ops.main()
        assert f"self-test FAILED: build again with {INSTALL}\n" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["ops", "--help"])
    with pytest.raises(SystemExit):
        ops.main()
    assert "The door to the two hot loops" in capsys.readouterr().out


def test_temperature_zero_takes_the_largest_logit_but_never_the_mask():
    logits, rows, z_t, table, step = reverse_case(2, 30, 50, 4)
    logits[..., 7], step[0] = 60.0, 1.0  # token 7 is the mask; all positions flip
    x_s, _ = ops.reverse_step(logits[:1], rows, z_t[:1], table, step, 7, SEED, Decoding(temperature=0))
    assert torch.equal(x_s, logits[0].index_fill(-1, torch.tensor([7], device=DEVICE), -torch.inf).argmax(-1))


def test_a_backend_asked_for_is_never_replaced():
    """Check that CADD_BACKEND=cpp without its shared library is an error that says how to build it. "auto" goes on."""
    code = (
        "import sys; sys.modules['cadd_min._C'] = None\n"
        "import cadd_min.kernels.build as b; b.CSRC = b.CSRC / 'none'\nimport cadd_min.ops as o; o.backend()"
    )
    done = run_python(code, CADD_BACKEND="cpp")
    assert done.returncode != 0 and "pip install" in done.stderr
    assert run_python(code, CADD_BACKEND="auto").returncode == 0


@pytest.mark.skipif(DEVICE == "cuda", reason="here is what is asked for")
@compiled
def test_cuda_where_there_is_none_is_a_sentence():
    """The kernels that were found have registered the operators by then."""
    done = run_python("import cadd_min.ops as o; o.backend()", CADD_BACKEND="cuda")
    assert "InputError: CADD_BACKEND=cuda: " in done.stderr.splitlines()[-1]


def test_reference_and_kernel_draw_the_same_samples():
    """Compare whole samples of the active backend with those of the reference, each in a process of its own."""
    code = (
        "import torch\nfrom tests.toys import nano, rng\nfrom tests.toys import chain\nnet = nano()\n"
        "torch.nn.init.normal_(net.head.weight, generator=rng(5))\n"
        "for z in ('hard', 'soft', 'sample'):\n"
        "    print(chain(net, (4, 12), net.table(), net.schedule, 11, steps=6, zhat=z, num_latents=2, top_p=.95, "
        "generator=rng(1)).tolist())"
    )
    active, torch_only = (run_python(code, CADD_BACKEND=name) for name in ("auto", "torch"))
    assert active.returncode == 0, active.stderr
    assert active.stdout == torch_only.stdout and len(active.stdout) > 300


def test_errors_name_the_argument():
    with pytest.raises(InputError, match=r"^zhat must be one of"):
        ops.reverse_step(*reverse_case(1, 2, 5, 3), 5, SEED, Decoding("mushy"))
