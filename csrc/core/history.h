// The flight recorder: a ring on the device with what the latest steps used, written by the step itself.
#pragma once

#include "platform.h"

FS_NAMESPACE_BEGIN

constexpr int64_t kHistoryLength = 4096;

// A step is a row of doubles: these columns, then learning rate and weight decay of each group.
enum HistoryColumn : int32_t {
  kHistoryClock = 0,
  kHistoryNorm = 1,
  kHistoryClip = 2,
  kHistorySkipped = 3,
  kHistoryColumns = 4,
};

// Where the rows are. Itself on the device and written in place: a captured graph follows to a wider ring.
struct History {
  uint64_t rows;       // address of kHistoryLength rows
  int64_t row_length;  // doubles
  int64_t num_groups;  // that have columns
  int64_t count;       // steps begun so far; the latest is row (count - 1) % kHistoryLength
  uint64_t row;        // address of the row that the running call writes; 0: none
};

// Writes what concerns the whole step. A tick begins a row; later calls of its round (ZeRO steps sub-groups one by
// one) write to the same one, and a skipped call takes nothing back of what an applied one wrote.
FS_HD_CALL void begin_record(History& history, bool tick, int64_t clock_step, bool skipped, double norm, double clip) {
  if (tick) history.count += 1;
  history.row = 0;
  if (history.count == 0) return;
  const int64_t index = (history.count - 1) % kHistoryLength;
  double* const row = reinterpret_cast<double*>(history.rows) + index * history.row_length;
  if (!tick && skipped && row[kHistorySkipped] == 0.0) return;
  history.row = reinterpret_cast<uint64_t>(row);
  row[kHistoryClock] = static_cast<double>(clock_step);
  row[kHistoryNorm] = norm;
  row[kHistoryClip] = skipped ? NAN : clip;
  row[kHistorySkipped] = skipped ? 1.0 : 0.0;
}

// A skipped step used no values, nor did a group that the call does not know.
FS_HD_CALL void record_group(const History& history, int64_t group, bool used, double lr, double weight_decay) {
  if (history.row == 0) return;
  double* const columns = reinterpret_cast<double*>(history.row) + kHistoryColumns + 2 * group;
  columns[0] = used ? lr : NAN;
  columns[1] = used ? weight_decay : NAN;
}

FS_NAMESPACE_END
