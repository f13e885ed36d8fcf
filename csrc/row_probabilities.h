// The probabilities of one row of logits on the CPU, as the sums of its blocks of 256 tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector_blocks.h"

namespace cadd {

// The probabilities of one row: the softmax of the logits of each latent, averaged over the latents
// and cut to top_p of the mass. One object serves one thread, row after row.
template <typename Logit>
class Row {
 public:
  Row(int64_t latents, int64_t vocab, int64_t mask_id, float inv_temperature, double top_p)
      : latents_(latents),
        vocab_(vocab),
        mask_id_(mask_id),
        inv_temperature_(inv_temperature),
        top_p_(top_p),
        blocks_((vocab + kBlock - 1) / kBlock),
        largest_(latents * blocks_),
        factor_(latents * blocks_),
        row_largest_(latents),
        row_factor_(latents),
        mass_(blocks_),
        nucleus_(top_p < 1 ? blocks_ * kBlock : 0) {}

  // Read the logits of a row. Latent k begins at logits + k * stride. `will_draw` asks for the
  // masses that a draw needs. Return false if a logit is NaN or plus infinity, or all logits of a
  // latent are minus infinity.
  bool read(const Logit* logits, int64_t stride, bool will_draw) {
    logits_ = logits;
    stride_ = stride;
    is_cut_ = false;
    const bool with_masses = will_draw || latents_ > 1;  // the mode of a mean needs masses too
    std::fill(mass_.begin(), mass_.end(), 0.0);
    for (int64_t latent = 0; latent < latents_; ++latent)
      if (!read_latent(latent, with_masses)) return false;
    if (with_masses && top_p_ < 1) cut_to_nucleus();
    return true;
  }

  // Draw the token at which the cumulative probability passes `uniform`, a number in [0, 1).
  int64_t draw(double uniform) {
    double target = uniform * total_mass(), before = 0;
    int64_t block = 0, last = 0;
    for (; block < blocks_; ++block) {
      if (mass_[block] > 0) last = block;
      if (before + mass_[block] > target) break;
      before += mass_[block];
    }
    if (block == blocks_) {  // rounding passed the end: take the last token with a probability
      block = last;
      before = 0;
      target = kInfinity;
    }
    return block * kBlock + find_in_block(block, before, target);
  }

  // Find the most probable token, the first of equals.
  int64_t argmax() { return latents_ == 1 ? argmax_of_logits() : argmax_of_mean(); }

  // Write the V normalised probabilities.
  void write(float* out) {
    const double total = total_mass();
    alignas(64) float probabilities[kBlock];
    for (int64_t block = 0; block < blocks_; ++block) {
      load_probabilities(block, probabilities);
      const int64_t begin = block * kBlock, count = std::min<int64_t>(kBlock, vocab_ - begin);
      for (int64_t i = 0; i < count; ++i)
        out[begin + i] = static_cast<float>(probabilities[i] / total);
    }
  }

 private:
  // Load the logits of one block, minus infinity for the mask. Return the largest, or NaN if a
  // logit is NaN or plus infinity.
  float load_logits(int64_t block, int64_t latent, float* out) {
    const int64_t begin = block * kBlock, count = std::min<int64_t>(kBlock, vocab_ - begin);
    const Logit* logits = logits_ + latent * stride_ + begin;
    const float largest = load_block(logits, count, inv_temperature_, out);
    if (mask_id_ < begin || mask_id_ >= begin + count) return largest;
    out[mask_id_ - begin] = -kInfinity;  // whatever it is, NaN too
    return block_max(out);
  }

  // Load the probabilities of one block, up to the common factor of the row.
  void load_probabilities(int64_t block, float* out) {
    if (is_cut_) {
      std::copy_n(nucleus_.data() + block * kBlock, kBlock, out);
      return;
    }
    std::fill_n(out, kBlock, 0.0f);
    alignas(64) float logits[kBlock];
    for (int64_t latent = 0; latent < latents_; ++latent) {
      const int64_t i = latent * blocks_ + block;
      if (factor_[i] == 0) continue;
      load_logits(block, latent, logits);
      add_exp(logits, largest_[i], factor_[i], out);
    }
  }

  // Read the logits of one latent. Return false if they give no probabilities.
  bool read_latent(int64_t latent, bool with_masses) {
    float* largest = largest_.data() + latent * blocks_;
    float* sums = factor_.data() + latent * blocks_;
    float row_largest = -kInfinity;
    bool valid = true;
    alignas(64) float logits[kBlock];
    for (int64_t block = 0; block < blocks_; ++block) {
      largest[block] = load_logits(block, latent, logits);
      valid &= !std::isnan(largest[block]);
      row_largest = std::max(row_largest, largest[block]);
      if (with_masses)
        sums[block] = largest[block] > -kInfinity ? sum_exp(logits, largest[block]) : 0.0f;
    }
    if (!valid || row_largest == -kInfinity) return false;
    if (with_masses) normalise(largest, sums, row_largest);
    return true;
  }

  // Add one latent's share to the masses of the blocks. Replace each block's sum of exponentials,
  // relative to the largest logit of the block, by the factor that normalises the exponentials.
  void normalise(const float* largest, float* sums, float row_largest) {
    double norm = 0;
    for (int64_t block = 0; block < blocks_; ++block)
      norm += double{sums[block]} * exp_nonpositive(largest[block] - row_largest);
    const int64_t latent = (largest - largest_.data()) / blocks_;
    row_largest_[latent] = row_largest;
    row_factor_[latent] = static_cast<float>(1 / (norm * latents_));
    for (int64_t block = 0; block < blocks_; ++block) {
      const double factor = exp_nonpositive(largest[block] - row_largest) / (norm * latents_);
      mass_[block] += sums[block] * factor;
      sums[block] = static_cast<float>(factor);
    }
  }

  // Sum the masses of all blocks.
  double total_mass() const {
    double total = 0;
    for (const double mass : mass_) total += mass;
    return total;
  }

  // Find the token of a block at which the cumulative mass passes `target`, or the last token that
  // has a probability. `before` is the mass of the blocks before it.
  int64_t find_in_block(int64_t block, double before, double target) {
    alignas(64) float probabilities[kBlock];
    load_probabilities(block, probabilities);
    int64_t found = -1;
    double cumulative = before;
    for (int i = 0; i < kBlock; ++i) {
      if (probabilities[i] <= 0) continue;
      found = i;
      cumulative += probabilities[i];
      if (cumulative > target) break;
    }
    return found;
  }

  // Find the token of the largest logit: with one latent the order of the logits is that of the
  // probabilities.
  int64_t argmax_of_logits() {
    alignas(64) float logits[kBlock];
    const int64_t block = std::max_element(largest_.begin(), largest_.end()) - largest_.begin();
    load_logits(block, 0, logits);
    return block * kBlock + (std::max_element(logits, logits + kBlock) - logits);
  }

  // Find the token of the largest mean probability.
  int64_t argmax_of_mean() {
    alignas(64) float probabilities[kBlock];
    int64_t best = -1;
    float highest = 0;
    for (int64_t block = 0; block < blocks_; ++block) {
      if (mass_[block] <= highest) continue;  // the mass bounds each probability of the block
      load_probabilities(block, probabilities);
      const float* top = std::max_element(probabilities, probabilities + kBlock);
      if (*top > highest) {
        highest = *top;
        best = block * kBlock + (top - probabilities);
      }
    }
    return best;
  }

  // Zero all probabilities outside the nucleus: the most probable tokens that hold top_p of the
  // mass, and the tokens that equal the last of these tokens.
  void cut_to_nucleus() {
    fill_nucleus();
    is_cut_ = true;
    double total = 0;
    for (const float probability : nucleus_) total += probability;
    const float threshold = nucleus_threshold(top_p_ * total);
    for (int64_t block = 0; block < blocks_; ++block) {
      mass_[block] = 0;
      for (int64_t i = block * kBlock; i < (block + 1) * kBlock; ++i) {
        if (nucleus_[i] < threshold) nucleus_[i] = 0;
        mass_[block] += nucleus_[i];
      }
    }
  }

  // Write all probabilities, relative to the largest logit of the row. So equal logits of different
  // blocks have equal probabilities, and ties at the end of the nucleus are found.
  void fill_nucleus() {
    std::fill(nucleus_.begin(), nucleus_.end(), 0.0f);
    alignas(64) float logits[kBlock];
    for (int64_t latent = 0; latent < latents_; ++latent) {
      for (int64_t block = 0; block < blocks_; ++block) {
        if (factor_[latent * blocks_ + block] == 0) continue;
        load_logits(block, latent, logits);
        float* out = nucleus_.data() + block * kBlock;
        add_exp(logits, row_largest_[latent], row_factor_[latent], out);
      }
    }
  }

  // Find the largest probability from which on the tokens hold `mass`. Positive floats are ordered
  // like their bits, so three histograms over 11, 11 and 10 bits find it.
  //
  // One thread fills a histogram in token order; GPU threads would need atomic adds of floats,
  // whose order varies, so the CUDA kernel bisects.
  float nucleus_threshold(double mass) {
    uint32_t prefix = 0;
    int known_bits = 0;
    for (const int bits : {11, 11, 10}) {
      fill_histogram(prefix, known_bits, bits);
      uint32_t bin = (1u << bits) - 1, last = bin;
      for (;; --bin) {
        if (histogram_[bin] > 0) last = bin;
        if (histogram_[bin] >= mass || bin == 0) break;
        mass -= histogram_[bin];
      }
      if (histogram_[bin] < mass) bin = last;  // rounding: the whole mass is needed
      prefix = prefix << bits | bin;
      known_bits += bits;
    }
    return bits_to_float(prefix);
  }

  // Sum the probabilities that begin with the known bits `prefix`, by their next `bits` bits.
  void fill_histogram(uint32_t prefix, int known_bits, int bits) {
    const int shift = 32 - bits - known_bits;
    histogram_.assign(size_t{1} << bits, 0.0);
    for (const float probability : nucleus_) {
      const uint32_t code = float_to_bits(probability);
      if (known_bits == 0 || code >> (32 - known_bits) == prefix)
        histogram_[(code >> shift) & ((1u << bits) - 1)] += probability;
    }
  }

  const int64_t latents_;           // K
  const int64_t vocab_;             // V
  const int64_t mask_id_;           // has probability 0, also among the V tokens
  const float inv_temperature_;     // 1 / temperature
  const double top_p_;              // in (0, 1]
  const int64_t blocks_;            // ceil(V / kBlock)
  std::vector<float> largest_;      // (K, blocks) largest logit
  std::vector<float> factor_;       // (K, blocks) factor of exp(logit - largest)
  std::vector<float> row_largest_;  // (K,) largest logit of the row
  std::vector<float> row_factor_;   // (K,) factor of exp(logit - row_largest)
  std::vector<double> mass_;        // (blocks,) sum of the probabilities
  std::vector<float> nucleus_;      // (blocks * kBlock,) probabilities after top-p
  std::vector<double> histogram_;   // (2^bits,) masses
  const Logit* logits_ = nullptr;   // (V,) of the first latent
  int64_t stride_ = 0;              // elements between the logits of two latents
  bool is_cut_ = false;             // nucleus_ holds the probabilities
};

}  // namespace cadd
