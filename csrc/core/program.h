// The layout of a schedule program, and the check that bytes from outside pass before anything evaluates
// them.
//
// A schedule is a tree. Its program is the tree in preorder, as plain bytes:
//
//   ProgramHeader | Node[num_nodes] | double[table_length]
//
// A node says how many children it has and where its subtree ends, so that the evaluator (schedule.h) finds a
// sibling without pointers and needs no recursion. The words people use (linear, join, repeat, ...) become
// programs in fused_sched/schedules; nothing here knows their names.
#pragma once

#include <stddef.h>

#include "platform.h"

// Curve shapes s(u): X(identifier, tag, name, type with the formula). Tags are in checkpoints: never renumber.
#define FS_CURVES(X)                                       \
  X(kCurveConstant, 0, "constant", ConstantCurve)          \
  X(kCurvePower, 1, "power", PowerCurve)                   \
  X(kCurveCosine, 2, "cosine", CosineCurve)                \
  X(kCurveExponential, 3, "exponential", ExponentialCurve) \
  X(kCurveLogarithm, 4, "logarithm", LogarithmCurve)       \
  X(kCurveTanh, 5, "tanh", TanhCurve)                      \
  X(kCurveTable, 6, "table", TableCurve)                   \
  X(kCurveLevels, 7, "levels", LevelsCurve)

// Node kinds: X(identifier, tag, name, type with its rules). Tags are in checkpoints: never renumber.
#define FS_NODE_KINDS(X)                     \
  X(kNodeCurve, 0, "curve", CurveNode)       \
  X(kNodeJoin, 1, "join", JoinNode)          \
  X(kNodeProduct, 2, "product", ProductNode) \
  X(kNodeSum, 3, "sum", SumNode)             \
  X(kNodeRepeat, 4, "repeat", RepeatNode)    \
  X(kNodeClock, 5, "clock", ClockNode)       \
  X(kNodeClamp, 6, "clamp", ClampNode)

FS_NAMESPACE_BEGIN

#define FS_ENUMERATOR(identifier, tag, name, type) identifier = tag,
enum Curve : int32_t { FS_CURVES(FS_ENUMERATOR) };
enum NodeKind : int32_t { FS_NODE_KINDS(FS_ENUMERATOR) };
#undef FS_ENUMERATOR

constexpr uint32_t kProgramMagic = 0x48435346;  // "FSCH" in little-endian bytes
constexpr uint32_t kProgramVersion = 1;
constexpr int32_t kMaxDepth = 32;       // of the tree: 768 bytes of stack in the evaluator
constexpr int32_t kMaxNodes = 1 << 20;  // 128 MiB
constexpr int32_t kMaxCycles = 4096;    // of a repeat whose cycles grow: they are counted one by one
constexpr double kMinGrowth = 1.01;     // of an endless one: 2^63 steps are then fewer than kMaxCycles cycles

struct ProgramHeader {
  uint32_t magic;
  uint32_t version;
  int32_t num_nodes;
  int32_t table_length;  // doubles
  int64_t total_bytes;
};

// value = clamp(offset + scale * s(u), low, high); see curve_argument for u.
struct CurveParameters {
  double origin;    // steps
  double limit;     // steps: the clock stops there; +inf where the curve has no end
  double divisor;   // steps; negative for a clock that counts down, as (end - t) / length
  double stairs;    // stairs per divisor; 0: smooth
  double repeats;   // saw teeth per divisor; 0: none
  double exponent;  // of u
  double p;
  double q;
  double offset;
  double scale;
  double low;
  double high;
};

// Cycle c lasts period * growth^c steps and is multiplied by gain^c.
struct RepeatParameters {
  double period;  // steps, as the child sees them
  double growth;
  double gain;
  double times;  // 0: endless
};

// t' = max(0, multiplier * t + addend), then floor(t' / every).
struct ClockParameters {
  double multiplier;
  double addend;
  double every;  // 0: smooth
};

// clamp(offset + scale * child, low, high).
struct ClampParameters {
  double offset;
  double scale;
  double low;
  double high;
};

struct Node {
  int32_t kind;   // NodeKind
  int32_t curve;  // Curve, of a curve node; 0 elsewhere
  int32_t num_children;
  int32_t end;          // index one past the last node of the subtree
  int32_t table_begin;  // index of the node's first double in the table
  int32_t table_length;
  int32_t complement;  // curve: 1 takes 1 - u
  int32_t reserved;
  union {
    CurveParameters as_curve;
    RepeatParameters as_repeat;
    ClockParameters as_clock;
    ClampParameters as_clamp;
  };
};

static_assert(sizeof(ProgramHeader) == 24 && sizeof(Node) == 128, "fused_sched/program.py packs these layouts");
static_assert(offsetof(Node, as_curve) == 32 && offsetof(Node, as_clamp) == 32, "likewise");

#if !defined(__CUDA_ARCH__)

inline bool is_finite(double x) { return (bits_of(x) & 0x7ff0000000000000) != 0x7ff0000000000000; }

// A bound may be infinite, but in its own direction only, and never a NaN.
inline bool is_range(double low, double high) { return low <= high && low < HUGE_VAL && high > -HUGE_VAL; }

inline bool is_count(double x) { return x >= 0.0 && is_finite(x) && floor(x) == x; }

inline const char* check_ends(const double* ends, int32_t num_ends, const char* problem) {
  for (int32_t i = 1; i < num_ends; ++i) {
    if (ends[i] < ends[i - 1]) return problem;
  }
  return nullptr;
}

inline const char* check_levels(const Node& node, const double* table) {
  if (node.table_length % 2 == 0) return "a levels curve has not one value per level and one end fewer";
  return check_ends(table, node.table_length / 2, "the ends of a levels curve are not in order");
}

// `table` is the node's own part of the program's.
inline const char* check_curve(const Node& node, const double* table) {
  const CurveParameters& c = node.as_curve;
  if (!is_finite(c.origin) || !is_finite(c.exponent) || !is_finite(c.p) || !is_finite(c.q) || !is_finite(c.offset) ||
      !is_finite(c.scale)) {
    return "a parameter of a curve is not finite";
  }
  if (!(c.limit > -HUGE_VAL)) return "the limit of a curve is not a number of steps";
  if (!is_finite(c.divisor) || c.divisor == 0.0) return "the divisor of a curve is zero or not finite";
  if (!(c.stairs >= 0.0 && is_finite(c.stairs))) return "the stairs of a curve are negative or not finite";
  if (!(c.repeats >= 0.0 && is_finite(c.repeats))) return "the repeats of a curve are negative or not finite";
  if (!is_range(c.low, c.high)) return "the bounds of a curve are not a range";
  if (node.complement != 0 && node.complement != 1) return "the complement flag of a curve is not 0 or 1";
  if (node.curve == kCurveTable) return node.table_length >= 1 ? nullptr : "a table curve has no table";
  if (node.curve == kCurveLevels) return check_levels(node, table);
  return node.table_length == 0 ? nullptr : "a curve that is not a table has one";
}

inline const char* check_join(const Node& node, const double* table) {
  if (node.table_length != 2 * node.num_children - 1) return "a join has not one origin per child and one end fewer";
  return check_ends(table, node.num_children - 1, "the ends of a join are not in order");
}

inline const char* check_repeat(const RepeatParameters& r) {
  if (!(r.period > 0.0 && is_finite(r.period))) return "the period of a repeat is not positive";
  if (!(r.growth > 0.0 && is_finite(r.growth))) return "the growth of a repeat is not positive";
  if (!is_finite(r.gain)) return "the gain of a repeat is not finite";
  if (!is_count(r.times)) return "the times of a repeat are not a count";
  if (r.growth == 1.0 || (r.times > 0.0 && r.times <= kMaxCycles)) return nullptr;
  return r.times == 0.0 && r.growth >= kMinGrowth ? nullptr : "a repeat with growing cycles has too many of them";
}

inline const char* check_clock(const ClockParameters& c) {
  if (!is_finite(c.multiplier) || !is_finite(c.addend)) return "a parameter of a clock is not finite";
  return c.every >= 0.0 && is_finite(c.every) ? nullptr : "a clock counts every negative number of steps";
}

inline const char* check_clamp(const ClampParameters& c) {
  if (!is_finite(c.offset) || !is_finite(c.scale)) return "a parameter of a clamp is not finite";
  return is_range(c.low, c.high) ? nullptr : "the bounds of a clamp are not a range";
}

// One node by itself: `table` is the program's, whose entries are known to be finite.
inline const char* check_node(const Node& node, const double* table, int32_t table_length) {
  if (node.num_children < 0 || node.num_children > kMaxNodes) return "the number of children is out of range";
  if (node.reserved != 0) return "a reserved field of a node is set";
  if (node.table_begin < 0 || node.table_length < 0 || node.table_begin > table_length - node.table_length) {
    return "a node's table lies outside the program's";
  }
  if (node.kind == kNodeCurve) {
    if (node.num_children != 0) return "a curve has children";
#define FS_CASE(identifier, tag, name, type) node.curve == identifier ||
    return (FS_CURVES(FS_CASE) false) ? check_curve(node, table + node.table_begin) : "unknown curve";
#undef FS_CASE
  }
  if (node.kind != kNodeJoin && node.table_length != 0) return "a node that is neither table nor join has a table";
  if (node.curve != 0 || node.complement != 0) return "a node that is not a curve names one";
  const bool one_child = node.num_children == 1;
  switch (node.kind) {
    case kNodeJoin: return node.num_children >= 1 ? check_join(node, table + node.table_begin) : "a join is empty";
    case kNodeProduct:
    case kNodeSum: return node.num_children >= 1 ? nullptr : "a product or sum is empty";
    case kNodeRepeat: return one_child ? check_repeat(node.as_repeat) : "a repeat has not exactly one child";
    case kNodeClock: return one_child ? check_clock(node.as_clock) : "a clock has not exactly one child";
    case kNodeClamp: return one_child ? check_clamp(node.as_clamp) : "a clamp has not exactly one child";
    default: return "unknown kind of node";
  }
}

// Do `end` and `num_children` of all nodes describe one tree of bounded depth?
inline const char* check_tree(const Node* nodes, int32_t num_nodes) {
  struct Open {
    int32_t end;
    int32_t missing_children;
  };
  Open open[kMaxDepth];
  int32_t depth = 0;
  for (int32_t i = 0; i < num_nodes; ++i) {
    while (depth > 0 && open[depth - 1].end == i) {
      if (open[--depth].missing_children != 0) return "a node has fewer children than it says";
    }
    if (depth == 0 ? i != 0 : --open[depth - 1].missing_children < 0) return "a node has more children than it says";
    const int32_t outer_end = depth > 0 ? open[depth - 1].end : num_nodes;
    if (nodes[i].end <= i || nodes[i].end > outer_end) return "a subtree ends outside its parent";
    if (depth == kMaxDepth) return "the tree is too deep";
    open[depth++] = {nodes[i].end, nodes[i].num_children};
  }
  while (depth > 0) {
    if (open[depth - 1].end != num_nodes) return "a subtree ends outside its parent";
    if (open[--depth].missing_children != 0) return "a node has fewer children than it says";
  }
  return nullptr;
}

// Null for a program that evaluate() can run, else what is wrong with it.
inline const char* validate_program(const unsigned char* bytes, int64_t size) {
  if (reinterpret_cast<uintptr_t>(bytes) % sizeof(double) != 0) return "the program is not 8-byte aligned";
  if (size < static_cast<int64_t>(sizeof(ProgramHeader))) return "the program is shorter than its header";
  const ProgramHeader& header = *reinterpret_cast<const ProgramHeader*>(bytes);
  if (header.magic != kProgramMagic) return "these bytes are not a schedule program";
  if (header.version != kProgramVersion) return "the program has another version than this build reads";
  if (header.num_nodes < 1 || header.num_nodes > kMaxNodes) return "the number of nodes is out of range";
  if (header.table_length < 0) return "the table length is negative";
  const int64_t expected = static_cast<int64_t>(sizeof(ProgramHeader)) + header.num_nodes * int64_t{sizeof(Node)} +
                           header.table_length * int64_t{sizeof(double)};
  if (header.total_bytes != expected || size != expected) return "the program has another size than its header says";
  const Node* nodes = reinterpret_cast<const Node*>(bytes + sizeof(ProgramHeader));
  const double* table = reinterpret_cast<const double*>(nodes + header.num_nodes);
  for (int32_t i = 0; i < header.table_length; ++i) {
    if (!is_finite(table[i])) return "a value of the table is not finite";
  }
  for (int32_t i = 0; i < header.num_nodes; ++i) {
    if (const char* problem = check_node(nodes[i], table, header.table_length)) return problem;
  }
  return check_tree(nodes, header.num_nodes);
}

#endif  // !__CUDA_ARCH__

FS_NAMESPACE_END
