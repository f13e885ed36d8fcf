// The probabilities of one row of logits on the CPU, from the sums of its blocks of 256 tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector_blocks.h"

namespace cadd {

// The probabilities of one row: softmax of each of K latents' logits, averaged; cut to top_p of
// their mass if asked. One object serves one thread, row after row.
template <typename L>
class Row {
 public:
  Row(int64_t latents, int64_t vocab, int64_t mask_id, float inv_tau, double top_p)
      : latents_(latents),
        vocab_(vocab),
        mask_id_(mask_id),
        inv_tau_(inv_tau),
        top_p_(top_p),
        blocks_((vocab + kBlock - 1) / kBlock),
        top_(latents * blocks_),
        weight_(latents * blocks_),
        mass_(blocks_),
        kept_(top_p < 1 ? blocks_ * kBlock : 0) {}

  // Read the row's logits, latent k at logits + k * stride; the masses only where a draw will
  // follow. False if a logit is NaN or plus infinity, or all are minus infinity.
  bool read(const L* logits, int64_t stride, bool masses) {
    logits_ = logits, stride_ = stride, cut_ = false;
    masses = masses || latents_ > 1;
    std::fill(mass_.begin(), mass_.end(), 0.0);
    for (int64_t k = 0; k < latents_; ++k)
      if (!read_latent(k, masses)) return false;
    if (masses && top_p_ < 1) keep_top();
    return true;
  }

  // The token at which the cumulative probability passes u, in [0, 1).
  int64_t draw(double u) {
    double total = 0, rest, before = 0;
    for (const double mass : mass_) total += mass;
    rest = u * total;
    int64_t b = 0, last = 0;
    for (; b < blocks_; ++b) {
      if (mass_[b] > 0) last = b;
      if (before + mass_[b] > rest) break;
      before += mass_[b];
    }
    if (b == blocks_) b = last, before = 0, rest = kInfinity;  // rounding stepped beyond the end
    alignas(64) float p[kBlock];
    block(b, p);
    int64_t found = -1;
    double cdf = before;
    for (int i = 0; i < kBlock; ++i) {
      if (p[i] <= 0) continue;
      found = i;
      if ((cdf += p[i]) > rest) break;
    }
    return b * kBlock + found;
  }

  // The most probable token, the first of equals.
  int64_t argmax() {
    alignas(64) float p[kBlock];
    int64_t best = -1;
    float highest = 0;
    if (latents_ == 1) {
      const int64_t b = std::max_element(top_.begin(), top_.end()) - top_.begin();
      load(b, 0, p);
      return b * kBlock + (std::max_element(p, p + kBlock) - p);
    }
    for (int64_t b = 0; b < blocks_; ++b) {
      if (mass_[b] <= highest) continue;  // no token of it can win: mass bounds each
      block(b, p);
      const auto top = std::max_element(p, p + kBlock);
      if (*top > highest) highest = *top, best = b * kBlock + (top - p);
    }
    return best;
  }

  // All V probabilities, normalised.
  void write(float* out) {
    double total = 0;
    for (const double mass : mass_) total += mass;
    alignas(64) float p[kBlock];
    for (int64_t b = 0; b < blocks_; ++b) {
      block(b, p);
      const int64_t count = std::min<int64_t>(kBlock, vocab_ - b * kBlock);
      for (int64_t i = 0; i < count; ++i) out[b * kBlock + i] = static_cast<float>(p[i] / total);
    }
  }

 private:
  float load(int64_t b, int64_t k, float* out) {
    const int64_t begin = b * kBlock, count = std::min<int64_t>(kBlock, vocab_ - begin);
    const float top = load_block(logits_ + k * stride_ + begin, count, inv_tau_, out);
    if (mask_id_ < begin || mask_id_ >= begin + count) return top;
    out[mask_id_ - begin] = -kInfinity;  // the mask is no token
    return std::isnan(top) ? top : *std::max_element(out, out + kBlock);
  }

  bool read_latent(int64_t k, bool masses) {
    float* top = top_.data() + k * blocks_;
    float* weight = weight_.data() + k * blocks_;
    float highest = -kInfinity;
    bool good = true;
    alignas(64) float v[kBlock];
    for (int64_t b = 0; b < blocks_; ++b) {
      top[b] = load(b, k, v);
      good &= !std::isnan(top[b]);
      highest = std::max(highest, top[b]);
      if (masses) weight[b] = top[b] > -kInfinity ? sum_exp(v, top[b]) : 0.0f;
    }
    if (!good || highest == -kInfinity) return false;
    if (!masses) return true;
    double norm = 0;
    for (int64_t b = 0; b < blocks_; ++b)
      norm += double{weight[b]} * exp_nonpositive(top[b] - highest);
    for (int64_t b = 0; b < blocks_;
         ++b) {  // from here on, weight[b] is what exp(v - top[b]) is multiplied with
      const double scale = exp_nonpositive(top[b] - highest) / (norm * latents_);
      mass_[b] += weight[b] * scale;
      weight[b] = static_cast<float>(scale);
    }
    return true;
  }

  // Probabilities of one block, up to the row's common factor.
  void block(int64_t b, float* p) {
    if (cut_) {
      std::copy_n(kept_.data() + b * kBlock, kBlock, p);
      return;
    }
    std::fill_n(p, kBlock, 0.0f);
    alignas(64) float v[kBlock];
    for (int64_t k = 0; k < latents_; ++k) {
      if (weight_[k * blocks_ + b] == 0) continue;
      load(b, k, v);
      add_exp(v, top_[k * blocks_ + b], weight_[k * blocks_ + b], p);
    }
  }

  // Zero all but the nucleus: the tokens at least as probable as the last of those that hold top_p
  // of the mass.
  void keep_top() {
    for (int64_t b = 0; b < blocks_; ++b) block(b, kept_.data() + b * kBlock);
    cut_ = true;
    double total = 0;
    for (const float p : kept_) total += p;
    const float least = threshold(top_p_ * total);
    for (int64_t b = 0; b < blocks_; ++b) {
      mass_[b] = 0;
      for (int64_t i = b * kBlock; i < (b + 1) * kBlock; ++i) {
        if (kept_[i] < least) kept_[i] = 0;
        mass_[b] += kept_[i];
      }
    }
  }

  // The largest probability such that tokens from it on hold `rest` of the mass. Positive floats
  // are ordered like their bits: three histograms of 11, 11 and 10 bits find it.
  float threshold(double rest) {
    uint32_t prefix = 0, known = 0;
    for (const int bits : {11, 11, 10}) {
      const int shift = 32 - bits - static_cast<int>(known);
      histogram_.assign(size_t{1} << bits, 0.0);
      for (const float p : kept_) {
        const uint32_t code = float_to_bits(p);
        if (known == 0 || code >> (32 - known) == prefix)
          histogram_[(code >> shift) & ((1u << bits) - 1)] += p;
      }
      uint32_t bin = (1u << bits) - 1, last = bin;
      for (;; --bin) {
        if (histogram_[bin] > 0) last = bin;
        if (histogram_[bin] >= rest || bin == 0) break;
        rest -= histogram_[bin];
      }
      if (histogram_[bin] < rest) bin = last;  // rounding: all of the mass is needed
      prefix = prefix << bits | bin;
      known += bits;
    }
    return bits_to_float(prefix);
  }

  const int64_t latents_, vocab_, mask_id_;
  const float inv_tau_;
  const double top_p_;
  const int64_t blocks_;
  std::vector<float> top_,
      weight_;                // (K, blocks): largest logit, and the factor of its exponentials
  std::vector<double> mass_;  // (blocks): sum of probabilities
  std::vector<float> kept_;   // (V): the probabilities after top-p
  std::vector<double> histogram_;
  const L* logits_ = nullptr;
  int64_t stride_ = 0;
  bool cut_ = false;
};

}  // namespace cadd
