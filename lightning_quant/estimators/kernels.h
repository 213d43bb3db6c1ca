// Fake quantization in one pass over memory each way, float32, on processors: kernels.py says what it computes.
// The caller checks types, sizes and that everything is contiguous.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using V = at::vec::Vectorized<float>;

constexpr int64_t LANES = V::size();
#ifndef LIGHTNING_QUANT_AHEAD
#define LIGHTNING_QUANT_AHEAD 512
#endif
constexpr int64_t AHEAD = LIGHTNING_QUANT_AHEAD;  // elements that memory is asked for early: products fill the caches
constexpr int64_t GRAIN = 16384;  // elements that are worth a thread

enum Rule { STRAIGHT, SCALED, SURROGATE, SURROGATE_BYTES };  // the last: Theta in bytes, one for each element

// What a row of blocks is read with; shared by runs of rows.
struct Shared {
  const float* values;
  int64_t run;
  Shared(const Tensor& t, int64_t rows) : values(t.const_data_ptr<float>()), run(rows / t.numel()) {}
  float at(int64_t row) const { return values[run == 1 ? row : row / run]; }
};

struct Points {  // scales, zero points or one number, and the outermost codes
  Shared scale;
  std::optional<Shared> zero;
  float fixed, low, high;
  Points(const Tensor& scale, const std::optional<Tensor>& zero, double fixed, int64_t low, int64_t high, int64_t rows)
      : scale(scale, rows), fixed(float(fixed)), low(float(low)), high(float(high)) {
    if (zero) this->zero.emplace(*zero, rows);
  }
  float offset(int64_t row) const { return zero ? zero->at(row) : fixed; }
};

V clamped(V u, float low, float high) { return at::vec::clamp(u, V(low), V(high)); }  // NaN stays

// What vectors of 512 bits do with masks in a third of the instructions.
#ifdef CPU_CAPABILITY_AVX512
V inside(V given, V u, V least, V most) {
  const __mmask16 above = _mm512_cmp_ps_mask(u, least, _CMP_NLE_UQ);
  return _mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(above, u, most, _CMP_NGE_UQ), given);
}
V beyond(V x, float most) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.abs(), V(most), _CMP_NLE_UQ), x); }
V inverse(V x) {
  const V near(_mm512_rcp14_ps(x));
  return near * (V(2.0f) - x * near);
}
V whole_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// 2^x off by 1e-7 of it: the best polynomial of degree 5 between integers.
V power_of_two(V x) {
  const V whole = x.round(), f = x - whole;
  V y(0.00132765f);
  for (const float c : {0.00967554f, 0.05550713f, 0.2402212f, 0.69314697f, 1.0f}) y = at::vec::fmadd(y, f, V(c));
  return V(_mm512_scalef_ps(y, whole));
}
#else
V inside(V given, V u, V least, V most) { return V::blendv(given, V(0.0f), (u <= least) | (u >= most)); }
V beyond(V x, float most) { return V::blendv(x, V(0.0f), x.abs() <= V(most)); }
V inverse(V x) { return V(1.0f) / x; }
V whole_bytes(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
V power_of_two(V x) { return (x * V(0.69314718f)).exp_u20(); }
#endif

// PEGE's surrogate: what of it is the same for all elements,
struct Sharpness {
  float rate, stretch, steepness;
  explicit Sharpness(float k) : rate(-2 * k / std::log(2.0f)), stretch(1 / std::tanh(k / 2)), steepness(2 * k * stretch) {}
};

// and what is not.  t is a half of the hyperbolic tangent of k times the distance to the middle of a bin.
struct Surrogate {
  V slope, gap, error;
  Surrogate(V error, V b, V rest, const Sharpness& k) {  // rest: 1 - b
    const V r = error - ((V(-0.0f) & error) | V(0.5f));
    const V power = power_of_two(at::vec::clamp_max(r * V(k.rate), V(100.0f)));
    const V t = inverse(V(1.0f) + power) - V(0.5f);
    slope = at::vec::fmadd((V(0.25f) - t * t) * V(k.steepness), b, rest);
    gap = at::vec::fmsub(t, V(k.stretch), r);
    this->error = beyond(at::vec::fmadd(gap, b, error), 4 * std::numeric_limits<float>::epsilon());
  }
};

V part(const float* p, int64_t count) {
  __builtin_prefetch(p + AHEAD);
  return count == LANES ? V::loadu(p) : V::loadu(p, count);
}

V bytes(const uint8_t* p, int64_t count) {
  __builtin_prefetch(p + AHEAD);
  if (count == LANES) return whole_bytes(p);
  float wide[LANES] = {};
  for (int64_t i = 0; i < count; i++) wide[i] = float(p[i]);
  return V::loadu(wide);
}

const float UNIT = 1.0f / 255;  // of a Theta in bytes

void quantize(Tensor y, const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero, double fixed,
              int64_t low, int64_t high) {
  const int64_t size = x.size(-1), rows = x.numel() / size;
  const Points points(scale, zero, fixed, low, high, rows);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / size), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const V s(points.scale.at(row)), z(points.offset(row));
      for (int64_t k = row * size, end = k + size; k < end; k += LANES) {
        const int64_t count = std::min(LANES, end - k);
        const V u = part(from + k, count) / s + z;
        ((clamped(u.round(), points.low, points.high) - z) * s).store(to + k, int(count));
      }
    }
  });
}

// Scales whose top level is each row's largest magnitude, 1 where that is 0; y, if given, takes the rows rounded with them.
void quantize_dynamic(const std::optional<Tensor>& y, Tensor scales, const Tensor& x, double top, double fixed, int64_t low,
                      int64_t high) {
  const int64_t size = x.size(-1), rows = x.numel() / size;
  const float* from = x.const_data_ptr<float>();
  float* to = y ? y->mutable_data_ptr<float>() : nullptr;
  float* scale_to = scales.mutable_data_ptr<float>();
  const V z{float(fixed)};
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / size), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      V largest(0.0f);
      for (int64_t k = row * size, end = k + size; k < end; k += LANES)
        largest = at::vec::maximum(largest, part(from + k, std::min(LANES, end - k)).abs());
      const auto larger = [](V a, V b) { return at::vec::maximum(a, b); };
      const float size_of = at::vec::vec_reduce_all<float>(larger, largest) / float(top), scale = size_of > 0 ? size_of : 1;
      scale_to[row] = scale;
      if (to == nullptr) continue;
      const V s(scale);
      for (int64_t k = row * size, end = k + size; k < end; k += LANES) {
        const int64_t count = std::min(LANES, end - k);
        const V u = part(from + k, count) / s + z;
        ((clamped(u.round(), float(low), float(high)) - z) * s).store(to + k, int(count));
      }
    }
  });
}

// Rounds with one scale, and notes which elements lie inside of ``below`` to ``above``: a word of bits for each vector, and
// of each row whether all do.
void quantize_noting(Tensor y, Tensor whole, Tensor words, const Tensor& x, const Tensor& scale,
                     const std::optional<Tensor>& zero, double fixed, int64_t low, int64_t high, double below, double above) {
  const int64_t size = x.size(-1), rows = x.numel() / size;
  const Points points(scale, zero, fixed, low, high, rows);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  bool* flags = whole.mutable_data_ptr<bool>();
  int16_t* bits = words.mutable_data_ptr<int16_t>();
  const V s(points.scale.at(0)), z(points.offset(0)), least{float(below)}, most{float(above)};
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / size), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      int16_t* word = bits + row * words.size(-1);
      int missing = 0;
      for (int64_t k = row * size, end = k + size; k < end; k += LANES) {
        const int64_t count = std::min(LANES, end - k);
        const V u = part(from + k, count) / s + z;
        const int in = ((u <= least) | (u >= most)).zero_mask();
        missing |= ~in & ((1 << count) - 1);
        *word++ = int16_t(in);
        ((clamped(u.round(), points.low, points.high) - z) * s).store(to + k, int(count));
      }
      flags[row] = missing == 0;
    }
  });
}

// The gradient without what belongs to elements outside.
void mask_rows(Tensor grad, const Tensor& whole, const Tensor& words) {
  const int64_t size = grad.size(-1), rows = grad.numel() / size;
  float* g = grad.mutable_data_ptr<float>();
  const bool* flags = whole.const_data_ptr<bool>();
  const int16_t* bits = words.const_data_ptr<int16_t>();
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / size), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      if (flags[row]) continue;
      const int16_t* word = bits + row * words.size(-1);
      for (int64_t k = 0; k < size; k++)
        if (!(word[k / LANES] >> (k % LANES) & 1)) g[row * size + k] = 0;
    }
  });
}

V finite(V x) { return V::blendv(V(0.0f), x, x.abs() <= V(std::numeric_limits<float>::max())); }

// The gradient of x goes to out, which may be grad; y, if given, takes the rounded x, and own, if given, that of a Theta in
// bytes.  Answers each row's sums for the scale and for a shared Theta, or of the squares in own.
template <Rule RULE, bool LEARNS>
std::tuple<Tensor, Tensor> backward(Tensor& out, std::optional<Tensor>& y, const Tensor& grad, const Tensor& x,
                                    const Points& points, bool clips, double below, double above, double delta, bool interior,
                                    const std::optional<Tensor>& theta, float sharpness, float pull, std::optional<Tensor>& own) {
  const int64_t size = x.size(-1), rows = x.numel() / size;
  const float* from = x.const_data_ptr<float>();
  const float* g = grad.const_data_ptr<float>();
  float* moved = out.mutable_data_ptr<float>();
  float* to = y ? y->mutable_data_ptr<float>() : nullptr;
  constexpr bool each = RULE == SURROGATE_BYTES, learns_theta = RULE == SURROGATE;
  const uint8_t* codes = each ? theta->const_data_ptr<uint8_t>() : nullptr;
  float* own_to = each && own ? own->mutable_data_ptr<float>() : nullptr;
  std::optional<Shared> shared;
  if (learns_theta) shared.emplace(*theta, rows);
  Tensor of_scale = at::empty({LEARNS ? rows : 0}, x.options()), of_theta = at::empty({learns_theta || own_to ? rows : 0}, x.options());
  float* scale_to = of_scale.mutable_data_ptr<float>();
  float* theta_to = of_theta.mutable_data_ptr<float>();
  const Sharpness curve(sharpness);
  const V least(clips ? float(below) : -std::numeric_limits<float>::infinity());
  const V most(clips ? float(above) : std::numeric_limits<float>::infinity());
  const V strength = V(float(delta / (points.high - points.low)));
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / size), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float scale = points.scale.at(row);
      const V s(scale), z(points.offset(row)), pulls(scale * pull), common(learns_theta ? shared->at(row) : 0.0f), rest = V(1.0f) - common;
      V scale_sum(0.0f), theta_sum(0.0f);
      for (int64_t k = row * size, end = k + size; k < end; k += LANES) {
        const int64_t count = std::min(LANES, end - k);
        const V given = part(g + k, count), u = part(from + k, count) / s + z;
        const V kept = clips ? inside(given, u, least, most) : given;
        const V place = clamped(u, points.low, points.high), code = place.round();
        V whole = kept, task = kept;
        if constexpr (RULE == SCALED) whole = task = kept + (place - code) * kept.abs() * strength;
        if constexpr (each || learns_theta) {
          const V b = each ? bytes(codes + k, count) * V(UNIT) : common;
          const Surrogate f(place - code, b, each ? V(1.0f) - b : rest, curve);
          const V total = at::vec::fmadd(f.error, pulls, kept);
          task = kept * f.slope;
          whole = total * f.slope;
          if constexpr (learns_theta) {
            const V sum = at::vec::fmadd(f.gap, total, theta_sum);
            theta_sum = count == LANES ? sum : V::set(theta_sum, sum, count);
          } else if (own_to != nullptr) {
            const V moves = finite(total * f.gap * s), sum = at::vec::fmadd(moves, moves, theta_sum);
            moves.store(own_to + k, int(count));
            theta_sum = count == LANES ? sum : V::set(theta_sum, sum, count);
          }
        }
        if constexpr (LEARNS) {
          const V sum = scale_sum + given * ((interior ? code : place) - z) - task * (u - z);
          scale_sum = count == LANES ? sum : V::set(scale_sum, sum, count);
        }
        whole.store(moved + k, int(count));
        if (to != nullptr) ((code - z) * s).store(to + k, int(count));
      }
      const auto add = [](V a, V b) { return a + b; };
      if constexpr (LEARNS) scale_to[row] = at::vec::vec_reduce_all<float>(add, scale_sum);
      if constexpr (learns_theta) theta_to[row] = at::vec::vec_reduce_all<float>(add, theta_sum) * scale;
      if (own_to != nullptr) theta_to[row] = at::vec::vec_reduce_all<float>(add, theta_sum);
    }
  });
  return {of_scale, of_theta};
}

float number(const std::optional<Tensor>& t) { return t ? *t->const_data_ptr<float>() : 0.0f; }

std::tuple<Tensor, Tensor> gradients(Tensor out, std::optional<Tensor> y, const Tensor& grad, const Tensor& x,
                                     const Tensor& scale, const std::optional<Tensor>& zero, double fixed, int64_t low, int64_t high,
                                     int64_t rule, bool clips, double below, double above, double delta, bool learns,
                                     bool interior, const std::optional<Tensor>& theta,
                                     const std::optional<Tensor>& sharpness, const std::optional<Tensor>& pull,
                                     std::optional<Tensor> own) {
  const Points points(scale, zero, fixed, low, high, x.numel() / x.size(-1));
  const auto run = [&](auto* body) {
    return body(out, y, grad, x, points, clips, below, above, delta, interior, theta, number(sharpness), number(pull), own);
  };
  if (rule == STRAIGHT) return learns ? run(backward<STRAIGHT, true>) : run(backward<STRAIGHT, false>);
  if (rule == SCALED) return learns ? run(backward<SCALED, true>) : run(backward<SCALED, false>);
  if (theta->scalar_type() != at::kByte) return learns ? run(backward<SURROGATE, true>) : run(backward<SURROGATE, false>);
  return learns ? run(backward<SURROGATE_BYTES, true>) : run(backward<SURROGATE_BYTES, false>);
}

// Numbers in [0, 1): noise.py's, of places in memory.
V uniform(uint32_t index, uint32_t start) {
  float drawn[LANES];
  for (int64_t i = 0; i < LANES; i++) {
    uint32_t h = index + uint32_t(i) + start;
    h = (h ^ (h >> 16)) * 0x7FEB352Du;
    h = (h ^ (h >> 15)) * 0x846CA68Bu;
    drawn[i] = float((h ^ (h >> 16)) >> 8) * 0x1p-24f;
  }
  return V::loadu(drawn);
}

// Theta less its gradient times a factor, rounded by chance: the numbers are noise.py's.  Bytes may alias anything unless
// it is said that they do not, and loops are made vectors of only then.
void move(uint8_t* __restrict theta, const float* __restrict own, float factor, uint32_t begin, int64_t first,
          int64_t last) {
  for (int64_t k = first; k < last; k++) {
    uint32_t h = uint32_t(k) + begin;
    h = (h ^ (h >> 16)) * 0x7FEB352Du;
    h = (h ^ (h >> 15)) * 0x846CA68Bu;
    const float drawn = float(int32_t((h ^ (h >> 16)) >> 8)) * 0x1p-24f;
    const float moved = float(theta[k]) - own[k] * factor + drawn, most = moved < 255 ? moved : 255;
    theta[k] = uint8_t(int32_t(most > 0 ? most : 0));  // which rounds down
  }
}

// A step of PEGE's Theta in bytes, in place, given its gradient and the sums of its squares.
void step_bytes(Tensor theta, const Tensor& own, const Tensor& squares, double rate, int64_t start) {
  double all = 0;
  for (const float *p = squares.const_data_ptr<float>(), *end = p + squares.numel(); p < end; p++) all += *p;
  const float rms = std::max(float(std::sqrt(all / double(theta.numel()))), std::numeric_limits<float>::min());
  const float factor = float(rate * 255) / rms, *grad = own.const_data_ptr<float>();
  const uint32_t begin = uint32_t(start) * 0x9E3779B1u;
  uint8_t* codes = theta.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, theta.numel(), GRAIN, [=](int64_t first, int64_t last) {
    move(codes, grad, factor, begin, first, last);
  });
}

// The same given the gradient of the weight x; spare: memory of its size.
void theta_step(Tensor theta, Tensor spare, const Tensor& grad, const Tensor& x, const Tensor& scale,
                const std::optional<Tensor>& zero, double fixed, int64_t low, int64_t high, const Tensor& sharpness,
                double rate, const Tensor& start) {
  const int64_t size = x.size(-1), rows = x.numel() / size;
  const Points points(scale, zero, fixed, low, high, rows);
  const float* from = x.const_data_ptr<float>();
  const float* g = grad.const_data_ptr<float>();
  const uint8_t* codes = theta.const_data_ptr<uint8_t>();
  const Sharpness curve(*sharpness.const_data_ptr<float>());
  float* own_to = spare.mutable_data_ptr<float>();
  Tensor squares = at::empty({rows}, x.options());
  float* square_to = squares.mutable_data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / size), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const V s(points.scale.at(row)), z(points.offset(row));
      V sum(0.0f);
      for (int64_t k = row * size, end = k + size; k < end; k += LANES) {
        const int64_t count = std::min(LANES, end - k);
        const V place = clamped(part(from + k, count) / s + z, points.low, points.high);
        const V b = bytes(codes + k, count) * V(UNIT);
        const Surrogate f(place - place.round(), b, V(1.0f) - b, curve);
        // What is no number moves nothing.
        const V moves = finite(part(g + k, count) * inverse(at::vec::clamp_min(f.slope, V(1e-3f))) * f.gap * s);
        moves.store(own_to + k, int(count));
        const V more = sum + moves * moves;
        sum = count == LANES ? more : V::set(sum, more, count);
      }
      square_to[row] = at::vec::vec_reduce_all<float>([](V a, V b) { return a + b; }, sum);
    }
  });
  step_bytes(theta, spare, squares, rate, *start.const_data_ptr<int64_t>());
}

}  // namespace
