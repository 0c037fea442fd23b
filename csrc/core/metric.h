// Rates that react to a metric: state machines that one reported value advances by one report. The arithmetic and its
// order are the libraries' (torch 2.13 ReduceLROnPlateau, transformers 5.23 GreedyLR), counts included, so that the
// rates are equal to theirs, bit for bit. A NaN compares false, as there.
#pragma once

#include <stddef.h>

#include "platform.h"

// Rules: X(identifier, tag, name, type that advances its State).
#define FS_METRIC_RULES(X)                 \
  X(kMetricPlateau, 0, "plateau", Plateau) \
  X(kMetricGreedy, 1, "greedy", Greedy)

FS_NAMESPACE_BEGIN

#define FS_ENUMERATOR(identifier, tag, name, type) identifier = tag,
enum MetricRuleKind : int32_t { FS_METRIC_RULES(FS_ENUMERATOR) };
#undef FS_ENUMERATOR

// Counts are doubles: the libraries accept fractions of them and infinity.
struct MetricRule {
  int32_t kind;      // MetricRuleKind
  int32_t maximize;  // 1: a higher metric is better
  int32_t relative;  // 1: the threshold is a fraction of the best metric
  int32_t window;    // greedy: latest metrics that are averaged; 0: the metric as it is
  double base_lr;
  double factor;
  double patience;  // reports
  double threshold;
  double cooldown;  // reports
  double warmup;    // reports
  double min_lr;
  double max_lr;
  double eps;          // smallest change of the rate that is made
  double reset_start;  // reductions at min_lr
};

struct PlateauState {
  double lr;
  double best;
  double num_bad;
  double cooldown_left;
};

// Followed by rule.window doubles, the metrics in the window.
struct GreedyState {
  double lr;
  double best;
  double num_bad;
  double cooldown_left;
  double num_good;
  double warmup_left;
  double resets_left;
  double window_sum;
  double window_length;
  double window_oldest;  // index of the oldest metric of a full window, which the next one replaces
};

// One group's machine: its rule, and the address of its state.
struct MetricRecord {
  MetricRule rule;
  uint64_t state;  // 0: the group's rate does not depend on metrics
};

static_assert(sizeof(MetricRule) == 96 && offsetof(MetricRecord, state) == 96,
              "fused_sched/metric_rule.py packs these");
static_assert(offsetof(PlateauState, lr) == 0 && offsetof(GreedyState, lr) == 0, "a state's address is its rate's");

FS_HD_CALL bool is_better(const MetricRule& rule, double metric, double best) {
  if (rule.maximize) return metric > (rule.relative ? best * (1.0 + rule.threshold) : best + rule.threshold);
  return metric < (rule.relative ? best * (1.0 - rule.threshold) : best - rule.threshold);
}

FS_HD_CALL double worst_metric(const MetricRule& rule) { return rule.maximize ? -HUGE_VAL : HUGE_VAL; }

FS_HD_CALL double reduced(const MetricRule& rule, double lr) {
  const double product = lr * rule.factor;
  const double bounded = rule.min_lr > product ? rule.min_lr : product;
  return lr - bounded > rule.eps ? bounded : lr;
}

FS_HD_CALL double increased(const MetricRule& rule, double lr) {
  const double quotient = lr / rule.factor;
  const double bounded = rule.max_lr < quotient ? rule.max_lr : quotient;
  return bounded - lr > rule.eps ? bounded : lr;
}

// Lowers the rate after more than `patience` reports without a better metric.
struct Plateau {
  using State = PlateauState;

  static FS_HD_CALL void advance(const MetricRule& rule, State& state, double metric) {
    if (is_better(rule, metric, state.best)) {
      state.best = metric;
      state.num_bad = 0.0;
    } else {
      state.num_bad += 1.0;
    }
    if (state.cooldown_left > 0.0) {
      state.cooldown_left -= 1.0;
      state.num_bad = 0.0;
    }
    if (state.num_bad > rule.patience) {
      state.lr = reduced(rule, state.lr);
      state.cooldown_left = rule.cooldown;
      state.num_bad = 0.0;
    }
  }
};

// Also raises the rate after more than `patience` better ones, and starts over after `reset_start` reductions at the
// lowest rate.
struct Greedy {
  using State = GreedyState;

  static FS_HD_CALL void advance(const MetricRule& rule, State& state, double metric) {
    if (rule.window > 0) metric = average(rule, state, metric);
    if (state.cooldown_left > 0.0 || state.warmup_left > 0.0) {
      double& left = state.cooldown_left > 0.0 ? state.cooldown_left : state.warmup_left;
      left -= 1.0;
      state.num_bad = 0.0;
      state.num_good = 0.0;
      return;
    }
    if (is_better(rule, metric, state.best)) {
      state.best = metric;
      state.num_bad = 0.0;
      state.num_good += 1.0;
    } else {
      state.num_bad += 1.0;
      state.num_good = 0.0;
    }
    if (state.num_good > rule.patience) {
      state.lr = increased(rule, state.lr);
      state.resets_left = rule.reset_start;
      state.warmup_left = rule.warmup;
      state.num_good = 0.0;
    } else if (state.num_bad > rule.patience) {
      reduce(rule, state);
      state.cooldown_left = rule.cooldown;  // after a reset, too
      state.num_bad = 0.0;
    }
  }

 private:
  static FS_HD_CALL double average(const MetricRule& rule, State& state, double metric) {
    double* window = reinterpret_cast<double*>(&state + 1);
    state.window_sum += metric;
    if (state.window_length < rule.window) {
      window[static_cast<int32_t>(state.window_length)] = metric;
      state.window_length += 1.0;
    } else {
      double& oldest = window[static_cast<int32_t>(state.window_oldest)];
      state.window_sum -= oldest;
      oldest = metric;
      state.window_oldest = state.window_oldest + 1.0 < rule.window ? state.window_oldest + 1.0 : 0.0;
    }
    return state.window_sum / state.window_length;
  }

  static FS_HD_CALL void reduce(const MetricRule& rule, State& state) {
    state.lr = reduced(rule, state.lr);
    if (state.lr > rule.min_lr) return;
    state.resets_left -= 1.0;
    if (!(state.resets_left <= 0.0)) return;
    state = {rule.base_lr, worst_metric(rule), 0.0, 0.0, 0.0, 0.0, rule.reset_start, 0.0, 0.0, 0.0};
  }
};

FS_HD_CALL void report_metric(const MetricRecord& record, double metric) {
  if (record.state == 0) return;
#define FS_CASE(identifier, tag, name, Rule) \
  case identifier: return Rule::advance(record.rule, *reinterpret_cast<Rule::State*>(record.state), metric);
  switch (record.rule.kind) { FS_METRIC_RULES(FS_CASE) }
#undef FS_CASE
}

FS_NAMESPACE_END
