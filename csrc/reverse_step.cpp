// The CPU kernel of the reverse step: it reads each row of V logits once and keeps the sums of its
// blocks of 256 tokens. A draw picks a block by these sums and reads this block again. Only "soft"
// writes probabilities, a few rows at a time, to multiply them by the table. Top-p keeps the
// probabilities of one row for each thread.
//
// The ladder to this kernel. Milliseconds for N=512 V=50,258, on one core of an AMD EPYC with
// AVX-512 unless said:
//   hard   sample
//   647            eager PyTorch, two cores: softmax writes (N, V), a draw needs V exponentials
//    47.4  142     one pass over the data, a draw needs one uniform, no vector code
//    31.5   64.6   vectors of 4 floats (SSE2)
//     9.2   14.0   vectors of 16 floats (AVX-512), written out for the maximum
//     6.4    9.2   two cores
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "ops.h"
#include "row_probabilities.h"

namespace cadd {
namespace {

// The arguments of one call, contiguous and checked: K latents, N masked rows, P positions.
struct Call {
  const at::Tensor& logits;     // (K, N, V) float32, float16 or bfloat16
  const at::Tensor& rows;       // (N,) int64: position of each row, from 0 to P - 1
  const at::Tensor& z_t;        // (K, P, D) float32: latents at time t
  const at::Tensor& table;      // (V or more, D) float32: latents of the tokens
  int64_t* x_s;                 // (N,) tokens at time s, written
  float* z_s;                   // (K, N, D) latents at time s, written
  ReverseColumns coefficients;  // of each row: rho_flip, pull, keep, std
  RandomStream random;          // seed and offset
  int64_t mask_id;              // the token of a masked position
  ZHat zhat;                    // how z0_hat is made
  float inv_temperature;        // 1 / temperature
  double top_p;                 // in (0, 1]

  int64_t latents() const { return logits.size(0); }
  int64_t count() const { return rows.size(0); }
  int64_t vocab() const { return logits.size(2); }
  int64_t positions() const { return z_t.size(1); }
  int64_t dim() const { return table.size(1); }
  int64_t position(int64_t n) const { return rows.const_data_ptr<int64_t>()[n]; }
};

// Copy the latent of a token that flips to row n of every latent of z_s.
void flip_latents(const Call& call, int64_t n, int64_t token) {
  const int64_t dim = call.dim();
  const float* w = call.table.const_data_ptr<float>() + token * dim;
  for (int64_t k = 0; k < call.latents(); ++k)
    std::copy_n(w, dim, call.z_s + (k * call.count() + n) * dim);
}

// Move row n of every latent of z_s, a row that stays masked, towards z_hat_of(k). `eps` has room
// for the noise of one latent.
template <typename ZHatOf>
void move_latents(const Call& call, int64_t n, float* eps, ZHatOf z_hat_of) {
  const int64_t dim = call.dim();
  const ReverseCoefficients coefficients = call.coefficients.of(n);
  for (int64_t k = 0; k < call.latents(); ++k) {
    const int64_t position = k * call.positions() + call.position(n);
    if (coefficients.std > 0) fill_normals(call.random, position, dim, eps);
    const float* z_t = call.z_t.const_data_ptr<float>() + position * dim;
    const float* z_hat = z_hat_of(k);
    float* z_s = call.z_s + (k * call.count() + n) * dim;
    for (int64_t e = 0; e < dim; ++e) z_s[e] = posterior(z_hat[e], z_t[e], eps[e], coefficients);
  }
}

// Step row n: its token and its latents, or its probabilities for "soft" if it stays masked. Return
// false if the logits give no probabilities.
template <typename Logit>
bool step_row(const Call& call, int64_t n, Row<Logit>& row, float* eps, float* probabilities) {
  const int64_t dim = call.dim(), position = call.position(n);
  const Choices choice = choices(call.random, position);
  const bool flip = choice.flip < call.coefficients.of(n).rho_flip;
  if (!flip) call.x_s[n] = call.mask_id;
  if (!flip && dim == 0) return true;  // without a latent nothing else changes
  const Logit* logits = call.logits.const_data_ptr<Logit>() + n * call.vocab();
  const bool will_draw = flip || call.zhat != ZHat::hard;
  if (!row.read(logits, call.logits.stride(0), will_draw)) return false;
  if (flip) {
    call.x_s[n] = row.draw(choice.token);
    flip_latents(call, n, call.x_s[n]);
  } else if (call.zhat == ZHat::soft) {
    row.write(probabilities);
  } else {
    const int64_t mode = call.zhat == ZHat::hard ? row.argmax() : -1;
    const float* table = call.table.const_data_ptr<float>();
    move_latents(call, n, eps, [&](int64_t k) {
      if (mode >= 0) return table + dim * mode;
      return table + dim * row.draw(hat_choice(call.random, k * call.positions() + position));
    });
  }
  return true;
}

// Step the rows [begin, end). For "soft", `probabilities` is an (end - begin, V) matrix. Set
// `valid` to false if the logits of a row give no probabilities.
template <typename Logit>
void step_rows(const Call& call, int64_t begin, int64_t end, float* probabilities,
               std::atomic<bool>& valid) {
  Row<Logit> row(call.latents(), call.vocab(), call.mask_id, call.inv_temperature, call.top_p);
  std::vector<float> eps(4 * quarter_of(call.dim()), 0.0f);
  for (int64_t n = begin; n < end; ++n) {
    float* out = probabilities ? probabilities + (n - begin) * call.vocab() : nullptr;
    if (!step_row(call, n, row, eps.data(), out)) {
      valid = false;
      return;
    }
  }
}

// Step all rows for "soft": write the probabilities of a chunk of rows, multiply them by the table,
// move the latents. A chunk keeps the matrix of probabilities small.
template <typename Logit>
void step_in_chunks(const Call& call, std::atomic<bool>& valid) {
  const int64_t vocab = call.vocab(), dim = call.dim();
  const int64_t chunk = std::max<int64_t>(1, (int64_t{1} << 22) / vocab);
  for (int64_t first = 0; first < call.count(); first += chunk) {
    const int64_t last = std::min(call.count(), first + chunk);
    // A row that flips stays uninitialised here, and its product is not used.
    const at::Tensor probabilities = at::empty({last - first, vocab}, call.table.options());
    float* out = probabilities.data_ptr<float>();
    at::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      step_rows<Logit>(call, begin, end, out + (begin - first) * vocab, valid);
    });
    if (!valid) return;
    const at::Tensor product = at::mm(probabilities, call.table.narrow(0, 0, vocab));
    const float* z_hat = product.const_data_ptr<float>();  // (last - first, D)
    at::parallel_for(first, last, 64, [&](int64_t begin, int64_t end) {
      std::vector<float> eps(4 * quarter_of(dim), 0.0f);
      for (int64_t n = begin; n < end; ++n) {
        if (call.x_s[n] != call.mask_id) continue;
        move_latents(call, n, eps.data(), [&](int64_t) { return z_hat + (n - first) * dim; });
      }
    });
  }
}

// Step all rows. Return false if the logits of a row give no probabilities.
template <typename Logit>
bool step_all_rows(const Call& call) {
  std::atomic<bool> valid{true};
  if (call.zhat == ZHat::soft && call.dim() > 0) {
    step_in_chunks<Logit>(call, valid);
  } else {
    at::parallel_for(0, call.count(), 1, [&](int64_t begin, int64_t end) {
      step_rows<Logit>(call, begin, end, nullptr, valid);
    });
  }
  return valid;
}

// Step all rows of logits of any type.
bool step_all_rows_of_type(const Call& call) {
  switch (call.logits.scalar_type()) {
    case at::kFloat: return step_all_rows<float>(call);
    case at::kBFloat16: return step_all_rows<c10::BFloat16>(call);
    default: return step_all_rows<c10::Half>(call);
  }
}

// Raise IndexError unless every row is a position of z_t.
void check_rows(const at::Tensor& rows, int64_t positions) {
  const int64_t* first = rows.const_data_ptr<int64_t>();
  const bool known = std::all_of(first, first + rows.size(0), [&](int64_t position) {
    return 0 <= position && position < positions;
  });
  TORCH_CHECK_INDEX(known, "reverse_step: rows must be from 0 to ", positions - 1,
                    ", the positions of z_t");
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> reverse_step_cpu(
    const at::Tensor& logits, const at::Tensor& rows, const at::Tensor& z_t,
    const at::Tensor& table, const at::Tensor& coefficients, const at::Tensor& seed,
    int64_t mask_id, int64_t zhat, double temperature, double top_p) {
  check_reverse_step(logits, rows, z_t, table, coefficients, seed, zhat, temperature, top_p);
  check_rows(rows, z_t.size(1));
  // Autocast would round the product of "soft".
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::Tensor x_s = at::empty({rows.size(0)}, rows.options());
  at::Tensor z_s = at::empty({logits.size(0), rows.size(0), table.size(1)}, table.options());
  const Call call{logits,
                  rows,
                  z_t,
                  table,
                  x_s.data_ptr<int64_t>(),
                  z_s.data_ptr<float>(),
                  {coefficients.const_data_ptr<double>(), coefficients.numel() / 4},
                  random_stream(seed.const_data_ptr<int64_t>()),
                  mask_id,
                  static_cast<ZHat>(zhat),
                  static_cast<float>(1.0 / temperature),
                  top_p};
  const bool valid = step_all_rows_of_type(call);
  TORCH_CHECK_VALUE(valid,
                    "reverse_step: a row of logits is NaN, plus infinity, or all minus infinity");
  return {x_s, z_s};
}

}  // namespace cadd
