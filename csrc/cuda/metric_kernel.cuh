// Advances every group's metric-driven rate by one report. One warp; a thread takes every 32nd group.
#pragma once

#include "../core/metric.h"
#include "runtime.h"

namespace fused_sched {

constexpr int kMetricThreads = 32;

struct MetricTable {
  const double* metric;
  const MetricRecord* records;
  int64_t num_records;
};

__global__ void __launch_bounds__(kMetricThreads) metric_kernel(FS_KERNEL_TABLE(MetricTable) table) {
  for (int64_t i = threadIdx.x; i < table.num_records; i += kMetricThreads) {
    report_metric(table.records[i], *table.metric);
  }
}

}  // namespace fused_sched
