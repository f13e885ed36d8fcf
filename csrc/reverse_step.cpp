// The CPU kernel of the reverse step. A row of V logits is read once; what a draw needs of it later
// are the sums of its blocks of 256 tokens, and one block again. No second (N, V) tensor exists but
// for "soft", which multiplies by it.
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

// One call: its tensors, contiguous and checked, and what every row shares.
struct Call {
  const at::Tensor &logits, &rows, &z_t,
      &table;    // (K, N, V), (N), (K, P, D) and (V or more, D), P positions
  int64_t* x_s;  // (N)
  float* z_s;    // (K, N, D)
  Step step;
  Stream stream;
  int64_t mask_id;
  ZHat zhat;
  float inv_tau;
  double top_p;
};

// z_s of row n for each latent: w[flipped], or a posterior step towards target(k).
template <typename Target>
void move(const Call& call, int64_t n, int64_t flipped, float* eps, Target target) {
  const int64_t count = call.rows.size(0), positions = call.z_t.size(1), dim = call.table.size(1);
  const int64_t position = call.rows.const_data_ptr<int64_t>()[n];
  const float* table = call.table.const_data_ptr<float>();
  for (int64_t k = 0; k < call.logits.size(0); ++k) {
    float* z_s = call.z_s + (k * count + n) * dim;
    if (flipped >= 0) {
      std::copy_n(table + flipped * dim, dim, z_s);
      continue;
    }
    if (call.step.std > 0) fill_normals(call.stream, k * positions + position, dim, eps);
    const float *z_t = call.z_t.const_data_ptr<float>() + (k * positions + position) * dim,
                *z_hat = target(k);
    for (int64_t e = 0; e < dim; ++e) z_s[e] = posterior(z_hat[e], z_t[e], eps[e], call.step);
  }
}

// Rows [begin, end): tokens, and for "hard" and "sample" latents too; for "soft" the probabilities,
// to multiply by.
template <typename L>
void tokens(const Call& call, int64_t begin, int64_t end, float* probabilities,
            std::atomic<bool>& good) {
  const int64_t latents = call.logits.size(0), vocab = call.logits.size(2),
                stride = call.logits.stride(0);
  const int64_t positions = call.z_t.size(1), dim = call.table.size(1);
  const float* table = call.table.const_data_ptr<float>();
  Row<L> row(latents, vocab, call.mask_id, call.inv_tau, call.top_p);
  std::vector<float> eps(4 * quarter_of(dim), 0.0f);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t position = call.rows.const_data_ptr<int64_t>()[n];
    const Choices choice = choices(call.stream, position);
    const bool flip = choice.flip < call.step.rho_flip;
    if (!flip && dim == 0) {  // a masked model's row that stays masked needs nothing
      call.x_s[n] = call.mask_id;
      continue;
    }
    if (!row.read(call.logits.const_data_ptr<L>() + n * vocab, stride,
                  flip || call.zhat != ZHat::hard)) {
      good = false;
      return;
    }
    const int64_t token = flip ? row.draw(choice.token) : -1;
    call.x_s[n] = flip ? token : call.mask_id;
    if (call.zhat == ZHat::soft && !flip) {
      row.write(probabilities + (n - begin) * vocab);
      continue;
    }
    const int64_t mode = call.zhat == ZHat::hard && !flip ? row.argmax() : -1;
    move(call, n, token, eps.data(), [&](int64_t k) {
      return table +
             dim * (mode >= 0 ? mode : row.draw(hat_choice(call.stream, k * positions + position)));
    });
  }
}

// All rows; "soft" in chunks of rows, so that their probabilities are a small matrix.
template <typename L>
bool run(const Call& call) {
  const int64_t count = call.rows.size(0), vocab = call.logits.size(2), dim = call.table.size(1);
  const bool soft = call.zhat == ZHat::soft && dim > 0;
  const int64_t chunk = soft ? std::max<int64_t>(1, (int64_t{1} << 22) / vocab) : count;
  std::atomic<bool> good{true};
  for (int64_t first = 0; first < count && good; first += chunk) {
    const int64_t last = std::min(count, first + chunk);
    const at::Tensor p =
        soft ? at::empty({last - first, vocab}, call.table.options()) : at::Tensor();
    float* probabilities = soft ? p.data_ptr<float>() : nullptr;
    at::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      tokens<L>(call, begin, end, soft ? probabilities + (begin - first) * vocab : nullptr, good);
    });
    if (!soft || !good) continue;
    const at::Tensor z_hat = at::mm(p, call.table.narrow(0, 0, vocab));
    at::parallel_for(first, last, 64, [&](int64_t begin, int64_t end) {
      std::vector<float> eps(4 * quarter_of(dim), 0.0f);
      for (int64_t n = begin; n < end; ++n)
        if (call.x_s[n] == call.mask_id)
          move(call, n, -1, eps.data(),
               [&](int64_t) { return z_hat.const_data_ptr<float>() + (n - first) * dim; });
    });
  }
  return good;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> reverse_step_cpu(const at::Tensor& logits,
                                                    const at::Tensor& rows, const at::Tensor& z_t,
                                                    const at::Tensor& table, const at::Tensor& step,
                                                    const at::Tensor& seed, int64_t mask_id,
                                                    int64_t zhat, double temperature,
                                                    double top_p) {
  check_reverse_step(logits, rows, z_t, table, step, seed, zhat, temperature, top_p);
  const int64_t* position = rows.const_data_ptr<int64_t>();
  TORCH_CHECK_INDEX(std::all_of(position, position + rows.size(0),
                                [&](int64_t p) { return 0 <= p && p < z_t.size(1); }),
                    "reverse_step: rows must be from 0 to ", z_t.size(1) - 1,
                    ", the positions of z_t");
  const c10::impl::ExcludeDispatchKeyGuard precise(
      c10::autocast_dispatch_keyset);  // the product for "soft" too
  at::Tensor x_s = at::empty({rows.size(0)}, rows.options());
  at::Tensor z_s = at::empty({logits.size(0), rows.size(0), table.size(1)}, table.options());
  const double* s = step.const_data_ptr<double>();
  const int64_t* key = seed.const_data_ptr<int64_t>();
  const Call call{
      logits,
      rows,
      z_t,
      table,
      x_s.data_ptr<int64_t>(),
      z_s.data_ptr<float>(),
      Step{s[0], static_cast<float>(s[1]), static_cast<float>(s[2]), static_cast<float>(s[3])},
      Stream{static_cast<uint64_t>(key[0]), static_cast<uint32_t>(key[1])},
      mask_id,
      static_cast<ZHat>(zhat),
      static_cast<float>(1.0 / temperature),
      top_p};
  bool good = true;
  if (logits.scalar_type() == at::kFloat)
    good = run<float>(call);
  else if (logits.scalar_type() == at::kBFloat16)
    good = run<c10::BFloat16>(call);
  else
    good = run<c10::Half>(call);
  TORCH_CHECK_VALUE(good,
                    "reverse_step: a row of logits is NaN, plus infinity, or all minus infinity");
  return {x_s, z_s};
}

}  // namespace cadd
