// Adam and AdamW for one element. Written once: the CPU loops and the CUDA kernels call these functions.
//
//   g = grad * grad_factor            unscaling, averaging and, with a minus sign, maximize
//   w = w - lr*wd*w                   decoupled decay, before the moments as in torch; or g = g + wd*w (L2)
//   m = m + (1-beta1)*(g - m)
//   v = v + (1-beta2)*(g*g - v)
//   w = w - lr/bc1 * m / (sqrt(v)/sqrt(bc2) + eps)
#pragma once

#include "platform.h"

FS_NAMESPACE_BEGIN

enum StepFlags : int32_t {
  kSkip = 1,             // found_inf: change nothing
  kDecoupledDecay = 2,   // w -= decay * w
  kL2Decay = 4,          // g += decay * w
  kFirstFromGrad = 8,    // beta1 < 0.5: see moving_average
  kSecondFromGrad = 16,  // beta2 < 0.5
};

// Everything about the step that one tensor's elements share; computed once in double, rounded once to T.
template <class T>
struct StepScalars {
  T grad_factor;
  T decay;           // lr * weight_decay if decoupled, weight_decay if L2
  T first_rate;      // 1 - beta1, or -beta1 with kFirstFromGrad
  T second_rate;     // 1 - beta2, or -beta2 with kSecondFromGrad
  T step_size;       // lr / (1 - beta1^t)
  T inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^t)
  T eps;
  int32_t flags;
};

// A moving average written as the distance to go, because 1 - beta keeps all its digits where beta as a float
// does not. Mean relative error of the second moment over 10,000 random gradients, beta2 = 0.999: 1.3e-8, against
// 1.3e-5 of the customary beta*v + (1-beta)*g*g; torch's fused form, whose bias fades, starts at 1.3e-5. (A single
// element is off by up to 2.6e-6, and under a constant gradient every fp32 average stalls within 1.4e-5.) For
// beta < 0.5 the average is nearer to the new value than to the old one, and starting there keeps a large old value
// from swallowing a small new one (beta = 0 gives the new value).
template <class V, class T>
FS_HD V moving_average(V old_value, V new_value, V distance, T rate, bool from_new) {
  return multiply_add(rate, distance, from_new ? new_value : old_value);
}

// The first half of an element's update: both moments, from the weight before it. kAmsgrad: and their maximum.
// V: T, or a vector of them.
template <bool kAmsgrad, class V, class T>
FS_HD void update_moments(V weight, V& exp_avg, V& exp_avg_sq, V& max_exp_avg_sq, V grad, const StepScalars<T>& s) {
  V g = grad * s.grad_factor;
  g = (s.flags & kL2Decay) ? multiply_add(s.decay, weight, g) : g;
  exp_avg = moving_average(exp_avg, g, g - exp_avg, s.first_rate, (s.flags & kFirstFromGrad) != 0);
  exp_avg_sq = moving_average(exp_avg_sq, g * g, multiply_add(g, g, -exp_avg_sq), s.second_rate,
                              (s.flags & kSecondFromGrad) != 0);
  if constexpr (kAmsgrad) max_exp_avg_sq = exp_avg_sq <= max_exp_avg_sq ? max_exp_avg_sq : exp_avg_sq;
}

// The direction of the step, m / (sqrt(v)/sqrt(bc2) + eps). second: the second moment, or with amsgrad the largest seen
// so far. Its type is that of V's quotients.
template <class V, class T>
FS_HD auto direction(V exp_avg, V second, const StepScalars<T>& s) {
  return exp_avg / multiply_add(square_root(second), s.inv_sqrt_bias2, s.eps);
}

template <class V, class Quotient, class T>
FS_HD V moved_weight(V weight, Quotient along, const StepScalars<T>& s) {
  const V decayed = (s.flags & kDecoupledDecay) ? multiply_add(-s.decay, weight, weight) : weight;
  return multiply_add(-s.step_size, along, decayed);
}

// The second half: the weight.
template <class V, class T>
FS_HD void update_weight(V& weight, V exp_avg, V second, const StepScalars<T>& s) {
  weight = moved_weight(weight, direction(exp_avg, second, s), s);
}

template <bool kAmsgrad, class V, class T>
FS_HD void adam_update(V& weight, V& exp_avg, V& exp_avg_sq, V& max_exp_avg_sq, V grad, const StepScalars<T>& s) {
  update_moments<kAmsgrad>(weight, exp_avg, exp_avg_sq, max_exp_avg_sq, grad, s);
  update_weight(weight, exp_avg, kAmsgrad ? max_exp_avg_sq : exp_avg_sq, s);
}

FS_NAMESPACE_END
