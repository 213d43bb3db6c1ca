// Fake quantization in one pass over memory each way, float32, on processors: kernels.py says what it computes.
// The caller checks types, sizes and that everything is contiguous.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using V = at::vec::Vectorized<float>;

constexpr int64_t LANES = V::size();
constexpr int64_t GRAIN = 16384;  // elements that are worth a thread

enum Rule { STRAIGHT, SCALED, SURROGATE };

// What a row of blocks is read with; shared by runs of rows.
struct Shared {
  const float* values;
  int64_t run;
  Shared(const Tensor& t, int64_t rows) : values(t.const_data_ptr<float>()), run(rows / t.numel()) {}
  float at(int64_t row) const { return values[row / run]; }
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

struct Surrogate {  // PEGE's, of one element each; 20 units in the last place of an exponential are enough
  V slope, gap, error;
  Surrogate(V error, V b, float sharpness, float top) {
    const V r = error - ((V(-0.0f) & error) | V(0.5f));
    const V sigmoid = V(1.0f) / (V(1.0f) + (r * V(-2 * sharpness)).exp_u20());
    slope = (sigmoid - sigmoid * sigmoid) * (V(2 * sharpness / top) * b) + (V(1.0f) - b);
    gap = (sigmoid - V(0.5f)) * V(1 / top) - r;
    const V all = error + gap * b;
    this->error = V::blendv(all, V(0.0f), all.abs() <= V(4 * std::numeric_limits<float>::epsilon()));
  }
};

V clamped(V u, float low, float high) { return at::vec::maximum(at::vec::minimum(u, V(high)), V(low)); }  // NaN stays

V part(const float* p, int64_t count) { return count == LANES ? V::loadu(p) : V::loadu(p, count); }

// Where all lanes are in use the loops have a fixed end, which compilers make vectors of.
V bytes(const uint8_t* p, int64_t count) {
  float wide[LANES] = {};
  if (count == LANES)
    for (int64_t i = 0; i < LANES; i++) wide[i] = float(p[i]);
  else
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

// The gradient of x goes to out, which may be grad; y, if given, takes the rounded x.  Answers each row's sums for the
// scale and for a shared Theta.
template <Rule RULE, bool LEARNS>
std::tuple<Tensor, Tensor> backward(Tensor& out, std::optional<Tensor>& y, const Tensor& grad, const Tensor& x,
                                    const Points& points, bool clips, double below, double above, double delta, bool interior,
                                    const std::optional<Tensor>& theta, float sharpness, float pull) {
  const int64_t size = x.size(-1), rows = x.numel() / size;
  const float* from = x.const_data_ptr<float>();
  const float* g = grad.const_data_ptr<float>();
  float* moved = out.mutable_data_ptr<float>();
  float* to = y ? y->mutable_data_ptr<float>() : nullptr;
  const bool each = RULE == SURROGATE && theta->scalar_type() == at::kByte, learns_theta = RULE == SURROGATE && !each;
  const uint8_t* codes = each ? theta->const_data_ptr<uint8_t>() : nullptr;
  std::optional<Shared> shared;
  if (learns_theta) shared.emplace(*theta, rows);
  Tensor of_scale = at::empty({LEARNS ? rows : 0}, x.options()), of_theta = at::empty({learns_theta ? rows : 0}, x.options());
  float* scale_to = of_scale.mutable_data_ptr<float>();
  float* theta_to = of_theta.mutable_data_ptr<float>();
  const float top = std::tanh(sharpness / 2);
  const V least(clips ? float(below) : -std::numeric_limits<float>::infinity());
  const V most(clips ? float(above) : std::numeric_limits<float>::infinity());
  const V strength = V(float(delta / (points.high - points.low)));
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / size), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float scale = points.scale.at(row);
      const V s(scale), z(points.offset(row)), pulls(scale * pull), common(learns_theta ? shared->at(row) : 0.0f);
      V scale_sum(0.0f), theta_sum(0.0f);
      for (int64_t k = row * size, end = k + size; k < end; k += LANES) {
        const int64_t count = std::min(LANES, end - k);
        const V given = part(g + k, count), u = part(from + k, count) / s + z;
        const V kept = clips ? V::blendv(given, V(0.0f), (u <= least) | (u >= most)) : given;
        const V place = clamped(u, points.low, points.high), code = place.round();
        V whole = kept, task = kept;
        if constexpr (RULE == SCALED) whole = task = kept + (place - code) * kept.abs() * strength;
        if constexpr (RULE == SURROGATE) {
          const Surrogate f(place - code, each ? bytes(codes + k, count) * V(UNIT) : common, sharpness, top);
          const V total = kept + f.error * pulls;
          task = kept * f.slope;
          whole = total * f.slope;
          if (learns_theta) {
            const V sum = theta_sum + f.gap * total;
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
      if (learns_theta) theta_to[row] = at::vec::vec_reduce_all<float>(add, theta_sum) * scale;
    }
  });
  return {of_scale, of_theta};
}

float number(const std::optional<Tensor>& t) { return t ? *t->const_data_ptr<float>() : 0.0f; }

std::tuple<Tensor, Tensor> gradients(Tensor out, std::optional<Tensor> y, const Tensor& grad, const Tensor& x,
                                     const Tensor& scale, const std::optional<Tensor>& zero, double fixed, int64_t low, int64_t high,
                                     int64_t rule, bool clips, double below, double above, double delta, bool learns,
                                     bool interior, const std::optional<Tensor>& theta,
                                     const std::optional<Tensor>& sharpness, const std::optional<Tensor>& pull) {
  const Points points(scale, zero, fixed, low, high, x.numel() / x.size(-1));
  const auto run = [&](auto* body) {
    return body(out, y, grad, x, points, clips, below, above, delta, interior, theta, number(sharpness), number(pull));
  };
  if (rule == STRAIGHT) return learns ? run(backward<STRAIGHT, true>) : run(backward<STRAIGHT, false>);
  if (rule == SCALED) return learns ? run(backward<SCALED, true>) : run(backward<SCALED, false>);
  return learns ? run(backward<SURROGATE, true>) : run(backward<SURROGATE, false>);
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

// A step of PEGE's Theta in bytes, in place, given the gradient of the weight x; spare: memory of its size.
void theta_step(Tensor theta, Tensor spare, const Tensor& grad, const Tensor& x, const Tensor& scale,
                const std::optional<Tensor>& zero, double fixed, int64_t low, int64_t high, const Tensor& sharpness,
                double rate, const Tensor& start) {
  const int64_t size = x.size(-1), rows = x.numel() / size;
  const Points points(scale, zero, fixed, low, high, rows);
  const float* from = x.const_data_ptr<float>();
  const float* g = grad.const_data_ptr<float>();
  uint8_t* codes = theta.mutable_data_ptr<uint8_t>();
  float* own = spare.mutable_data_ptr<float>();  // Theta's gradient
  const float sharp = *sharpness.const_data_ptr<float>(), top = std::tanh(sharp / 2);
  const V most(std::numeric_limits<float>::max());
  Tensor squares = at::empty({rows}, x.options());
  float* square_to = squares.mutable_data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / size), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const V s(points.scale.at(row)), z(points.offset(row));
      V sum(0.0f);
      for (int64_t k = row * size, end = k + size; k < end; k += LANES) {
        const int64_t count = std::min(LANES, end - k);
        const V place = clamped(part(from + k, count) / s + z, points.low, points.high);
        const Surrogate f(place - place.round(), bytes(codes + k, count) * V(UNIT), sharp, top);
        const V all = part(g + k, count) / at::vec::maximum(f.slope, V(1e-3f)) * f.gap * s;
        const V finite = V::blendv(V(0.0f), all, all.abs() <= most);  // what is no number moves nothing
        finite.store(own + k, int(count));
        const V more = sum + finite * finite;
        sum = count == LANES ? more : V::set(sum, more, count);
      }
      square_to[row] = at::vec::vec_reduce_all<float>([](V a, V b) { return a + b; }, sum);
    }
  });
  double all = 0;
  for (int64_t row = 0; row < rows; row++) all += square_to[row];
  const float rms = std::max(float(std::sqrt(all / double(x.numel()))), std::numeric_limits<float>::min());
  const float factor = float(rate * 255) / rms;
  const uint32_t begin = uint32_t(*start.const_data_ptr<int64_t>()) * 0x9E3779B1u;
  at::parallel_for(0, x.numel(), GRAIN, [=](int64_t first, int64_t last) {
    move(codes, own, factor, begin, first, last);
  });
}

TORCH_LIBRARY_FRAGMENT(lightning_quant, m) {
  m.def("quantize_into(Tensor(a!) y, Tensor x, Tensor scale, Tensor? zero, float fixed, int low, int high) -> ()");
  m.def(
      "gradients_into(Tensor(a!) out, Tensor(b!)? y, Tensor grad, Tensor x, Tensor scale, Tensor? zero, float fixed, int low, "
      "int high, int rule, bool clips, float below, float above, float delta, bool learns, bool interior, "
      "Tensor? theta, Tensor? sharpness, Tensor? pull) -> (Tensor, Tensor)");
  m.def(
      "theta_step(Tensor(a!) theta, Tensor(b!) spare, Tensor grad, Tensor x, Tensor scale, Tensor? zero, float fixed, int low, "
      "int high, Tensor sharpness, float rate, Tensor start) -> ()");
}

TORCH_LIBRARY_IMPL(lightning_quant, CPU, m) {
  m.impl("quantize_into", quantize);
  m.impl("gradients_into", gradients);
  m.impl("theta_step", theta_step);
}

}  // namespace
