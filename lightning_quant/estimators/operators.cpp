// Operators of the kernels, and the product of a Linear layer with rounded operands as one node of autograd.

#include "kernels.h"

#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Memory for what lives for one operation, which stays in the processor's cache: as scratch.py's, twice.
thread_local Tensor both[2];

Tensor scratch(const Tensor& like, int which = 0) {
  constexpr int64_t LARGEST = 1 << 24;
  if (like.numel() > LARGEST) return at::empty_like(like);
  Tensor& held = both[which];
  if (!held.defined() || held.numel() < like.numel()) held = at::empty({like.numel()}, like.options());
  return held.narrow(0, 0, like.numel()).view(like.sizes());
}

// A quantizer: the constants that native.py's ``constants`` lists, in its order, and its tensors.
struct Rounder {
  int64_t size, low, high, rule;
  bool clips, interior;
  double fixed, below, above, delta, factor, rate;
  Tensor scale;
  std::optional<Tensor> zero, theta, sharpness, pull;

  Rounder(c10::ArrayRef<double> c, Tensor scale, std::optional<Tensor> zero, std::optional<Tensor> theta = {},
          std::optional<Tensor> sharpness = {}, std::optional<Tensor> pull = {})
      : size(int64_t(c[0])), low(int64_t(c[1])), high(int64_t(c[2])), rule(int64_t(c[3])), clips(c[4] != 0),
        interior(c[5] != 0), fixed(c[6]), below(c[7]), above(c[8]), delta(c[9]), factor(c[10]), rate(c[11]),
        scale(std::move(scale)), zero(std::move(zero)), theta(std::move(theta)), sharpness(std::move(sharpness)), pull(std::move(pull)) {}

  bool passes(bool learns) const { return !clips && rule == STRAIGHT && !learns; }

  Tensor blocks(const Tensor& x) const { return x.view({-1, size}); }

  Tensor rounded(const Tensor& x, const Tensor& into) const {
    quantize(blocks(into), blocks(x), scale, zero, fixed, low, high);
    return into;
  }

  // In place of grad: gradients of the scale and of a shared Theta; y, if given, takes the rounded x, and a Theta in bytes
  // makes its step, if start is given.
  std::tuple<Tensor, Tensor> pull_back(Tensor& grad, const Tensor& x, bool learns, const std::optional<Tensor>& y,
                                       std::optional<int64_t> start = {}) const {
    Tensor of_scale, of_theta, moved = blocks(grad);
    if (passes(learns)) {
      if (y) rounded(x, *y);
      return {of_scale, of_theta};
    }
    std::optional<Tensor> again;
    if (y) again = blocks(*y);
    std::optional<Tensor> own;
    if (start) own = blocks(scratch(x, 1));
    std::tie(of_scale, of_theta) = gradients(moved, again, moved, blocks(x), scale, zero, fixed, low, high, rule, clips, below,
                                             above, delta, learns, interior, theta, sharpness, pull, own);
    if (start) step_bytes(*theta, *own, of_theta, rate, *start);
    return {learns ? gathered(of_scale, scale).mul_(factor) : Tensor(), of_theta.numel() && !start ? gathered(of_theta, *theta) : Tensor()};
  }

  // Sums of rows added up for what shares an entry.
  static Tensor gathered(const Tensor& rows, const Tensor& like) {
    return (rows.numel() == like.numel() ? rows : rows.view({like.numel(), -1}).sum(1)).view(like.sizes());
  }
};

// Ranges of a profile.
constexpr const char* FORWARD = "lightning_quant::forward";
constexpr const char* BACKWARD = "lightning_quant::backward";

const char* const ONCE =
    "QuantConfig.compile: expected a gradient that is not differentiated again, got create_graph=True. Set compile=False.";

std::optional<Tensor> given(const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; }

// Rows of dynamic scales, in front of which no gradient stops.
struct RoundedRows : torch::autograd::Function<RoundedRows> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, double top, double fixed, int64_t low, int64_t high) {
    Tensor y = at::empty_like(x);
    quantize_dynamic(y, at::empty({x.numel() / x.size(-1)}, x.options()), x, top, fixed, low, high);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) { return {grads[0], {}, {}, {}, {}}; }
};

Tensor rounded_rows(const Tensor& x, double top, double fixed, int64_t low, int64_t high) {
  return RoundedRows::apply(x, top, fixed, low, high);
}

Tensor dynamic_scale(const Tensor& x, double top) {
  auto shape = x.sizes().vec();
  shape.back() = 1;
  Tensor scales = at::empty(shape, x.options());
  quantize_dynamic({}, scales, x, top, 0, 0, 0);
  return scales;
}

// Inputs with one scale that nobody learns.  What is clipped has no gradient; most rows have nothing of that.  Kept is a bit
// per element: the input itself is read by nobody else.
struct RoundedInput : torch::autograd::Function<RoundedInput> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::vector<double>& way, const Tensor& scale,
                        const std::optional<Tensor>& zero) {
    const Rounder own(way, scale, zero);
    Tensor y = at::empty_like(x);
    RECORD_FUNCTION(FORWARD, {});
    if (!own.clips) return own.rounded(x, y);
    const int64_t rows = x.numel() / own.size;
    const Tensor whole = at::empty({rows}, x.options().dtype(at::kBool));
    const Tensor words = at::empty({rows, (own.size + LANES - 1) / LANES}, x.options().dtype(at::kShort));
    quantize_noting(own.blocks(y), whole, words, own.blocks(x), scale, zero, own.fixed, own.low, own.high, own.below, own.above);
    ctx->save_for_backward({whole, words});
    ctx->saved_data["size"] = own.size;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), ONCE);
    const auto saved = ctx->get_saved_variables();
    Tensor grad = grads[0];
    RECORD_FUNCTION(BACKWARD, {});
    if (!saved.empty() && !*saved[0].all().const_data_ptr<bool>()) {
      grad = grad.clone(at::MemoryFormat::Contiguous);
      mask_rows(grad.view({-1, ctx->saved_data["size"].toInt()}), saved[0], saved[1]);
    }
    return {grad, {}, {}, {}};
  }
};

// The last of them, which lives as long as the graph keeps it: layers that read the same input with the same numbers
// (query, key and value; gate and up) share it, and its gradient is masked once.
struct Last {
  c10::weak_intrusive_ptr<c10::TensorImpl> x, y;
  uint32_t x_version = 0, y_version = 0;
  std::vector<double> numbers;
};

Tensor rounded_input(const Tensor& x, std::vector<double> way, const Tensor& scale, const std::optional<Tensor>& zero) {
  static thread_local std::optional<Last> last;
  std::vector<double> numbers = way;
  numbers.push_back(*scale.const_data_ptr<float>());
  if (zero) numbers.push_back(*zero->const_data_ptr<float>());
  if (last && last->numbers == numbers && last->x.lock().get() == x.unsafeGetTensorImpl() && last->x_version == x._version())
    if (auto y = Tensor(last->y.lock()); y.defined() && y._version() == last->y_version) return y;
  Tensor y = RoundedInput::apply(x, way, scale, zero);
  last.reset();
  if (y.requires_grad())
    last = Last{c10::weak_intrusive_ptr<c10::TensorImpl>(x.getIntrusivePtr()),
                c10::weak_intrusive_ptr<c10::TensorImpl>(y.getIntrusivePtr()), uint32_t(x._version()), uint32_t(y._version()),
                std::move(numbers)};
  return y;
}

// A step's memory is at its peak between forward and backward.  What scratch holds is given back at the last layer of a
// forward, which is that with the number of the last one before the last backward.
struct Pass {
  int64_t layers = 0, last = 0;
  void forward() {
    if (++layers == last) both[0] = both[1] = Tensor();
  }
  void backward() {
    if (layers) last = layers;
    layers = 0;
  }
};
thread_local Pass pass;

constexpr int64_t MOVED = std::numeric_limits<int64_t>::min();  // and with the calls that follow it is still below 0

struct RoundedLinear : torch::autograd::Function<RoundedLinear> {
  using Maybe = std::optional<Tensor>;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Maybe& bias,
                        const std::vector<double>& way, const Tensor& scale, const Maybe& zero, const Maybe& theta,
                        const Maybe& sharpness, const Maybe& pull, const std::vector<double>& inner, const Maybe& inner_scale,
                        const Maybe& inner_zero, const Maybe& turn, const Maybe& step) {
    const auto kept = [](const Maybe& t) { return t ? *t : Tensor(); };
    ctx->save_for_backward({x, weight, scale, kept(zero), kept(theta), kept(sharpness), kept(pull), kept(inner_scale), kept(inner_zero)});
    ctx->saved_data["way"] = way;
    ctx->saved_data["inner"] = inner;
    ctx->saved_data["bias"] = bias.has_value();
    if (turn) {
      ctx->saved_data["turn"] = *turn;
      ctx->saved_data["step"] = *step;
    }
    const Rounder own(way, scale, zero);
    Tensor rounded = x, y = scratch(weight);
    {
      RECORD_FUNCTION(FORWARD, {});
      if (inner_scale) rounded = Rounder(inner, *inner_scale, inner_zero).rounded(x, at::empty_like(x));
      own.rounded(weight, y);
    }
    y = at::linear(rounded, y, bias);
    pass.forward();
    return at::_unsafe_view(y, y.sizes());  // which may be changed in place
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), ONCE);
    const auto saved = ctx->get_saved_variables();
    pass.backward();
    const Tensor &x = saved[0], &weight = saved[1];
    const auto way = ctx->saved_data["way"].toDoubleVector(), inner = ctx->saved_data["inner"].toDoubleVector();
    const Rounder own(way, saved[2], given(saved[3]), given(saved[4]), given(saved[5]), given(saved[6]));
    std::optional<Rounder> input;
    if (saved[7].defined()) input.emplace(inner, saved[7], given(saved[8]));
    size_t edge = 0;
    const auto wants = [&](bool present) { return present && ctx->needs_input_grad(edge++); };
    const bool of_x = wants(true), of_weight = wants(true), of_bias = wants(ctx->saved_data["bias"].toBool());
    const bool of_scale = wants(true);
    wants(own.zero.has_value());
    const bool of_theta = wants(own.theta.has_value());
    wants(own.sharpness.has_value());
    wants(own.pull.has_value());
    const bool of_inner = wants(input.has_value());
    const Tensor grad = grads[0].reshape({-1, weight.size(0)}), rows = x.view({-1, x.size(-1)});
    const bool of_input = of_x || of_inner;
    Tensor to_x, to_weight, to_bias, to_scale, to_theta, to_inner, y;
    if (of_weight || of_scale || of_theta) {
      Tensor rounded = rows;
      if (input) {
        RECORD_FUNCTION(BACKWARD, {});
        rounded = input->rounded(rows, at::empty_like(rows));
      }
      to_weight = at::mm(grad.t(), rounded);
      rounded.reset();
      if (of_input) y = scratch(weight);
      RECORD_FUNCTION(BACKWARD, {});
      std::tie(to_scale, to_theta) = own.pull_back(to_weight, weight, of_scale, given(y), of_weight ? own_turn(ctx) : std::nullopt);
    }
    if (of_input) {
      if (!y.defined()) y = own.rounded(weight, scratch(weight));
      to_x = at::mm(grad, y).view(x.sizes());
      RECORD_FUNCTION(BACKWARD, {});
      if (input) std::tie(to_inner, std::ignore) = input->pull_back(to_x, x, of_inner, {});
    }
    if (of_bias) to_bias = grad.sum(0);
    const Tensor none;
    return {to_x, to_weight, to_bias, none, to_scale, none, to_theta, none, none, none, to_inner, none, none, none};
  }

  // Where the draws of Theta's step start, if it is to be made now: at the first backward of one call.
  static std::optional<int64_t> own_turn(AutogradContext* ctx) {
    const auto found = ctx->saved_data.find("turn");
    if (found == ctx->saved_data.end()) return {};
    int64_t* turn = found->second.toTensor().mutable_data_ptr<int64_t>();
    if (turn[0] != 1) return {};
    turn[0] = MOVED;
    return *ctx->saved_data["step"].toTensor().const_data_ptr<int64_t>() + turn[1];
  }
};

Tensor rounded_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, std::vector<double> way,
                      const Tensor& scale, const std::optional<Tensor>& zero, const std::optional<Tensor>& theta,
                      const std::optional<Tensor>& sharpness, const std::optional<Tensor>& pull, std::vector<double> inner,
                      const std::optional<Tensor>& inner_scale, const std::optional<Tensor>& inner_zero,
                      const std::optional<Tensor>& turn, const std::optional<Tensor>& step) {
  if (turn && at::GradMode::is_enabled()) ++*turn->mutable_data_ptr<int64_t>();
  return RoundedLinear::apply(x, weight, bias, way, scale, zero, theta, sharpness, pull, inner, inner_scale, inner_zero, turn, step);
}

TORCH_LIBRARY_FRAGMENT(lightning_quant, m) {
  m.def("quantize_into(Tensor(a!) y, Tensor x, Tensor scale, Tensor? zero, float fixed, int low, int high) -> ()");
  m.def(
      "gradients_into(Tensor(a!) out, Tensor(b!)? y, Tensor grad, Tensor x, Tensor scale, Tensor? zero, float fixed, int low, "
      "int high, int rule, bool clips, float below, float above, float delta, bool learns, bool interior, "
      "Tensor? theta, Tensor? sharpness, Tensor? pull, Tensor(c!)? own) -> (Tensor, Tensor)");
  m.def(
      "theta_step(Tensor(a!) theta, Tensor(b!) spare, Tensor grad, Tensor x, Tensor scale, Tensor? zero, float fixed, int low, "
      "int high, Tensor sharpness, float rate, Tensor start) -> ()");
  m.def("dynamic_scale(Tensor x, float top) -> Tensor");
  m.def("rounded_rows(Tensor x, float top, float fixed, int low, int high) -> Tensor");
  m.def("rounded_input(Tensor x, float[] way, Tensor scale, Tensor? zero) -> Tensor");
  m.def(
      "rounded_linear(Tensor x, Tensor weight, Tensor? bias, float[] way, Tensor scale, Tensor? zero, Tensor? theta, "
      "Tensor? sharpness, Tensor? pull, float[] inner, Tensor? inner_scale, Tensor? inner_zero, Tensor(a!)? turn, "
      "Tensor? step) -> Tensor");
}

TORCH_LIBRARY_IMPL(lightning_quant, CPU, m) {
  m.impl("quantize_into", quantize);
  m.impl("gradients_into", gradients);
  m.impl("theta_step", theta_step);
  m.impl("dynamic_scale", dynamic_scale);
}

TORCH_LIBRARY_IMPL(lightning_quant, CompositeImplicitAutograd, m) {
  m.impl("rounded_linear", rounded_linear);
  m.impl("rounded_rows", rounded_rows);
  m.impl("rounded_input", rounded_input);
}

}  // namespace
