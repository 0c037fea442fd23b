// The one evaluator of schedule programs (their layout: program.h). Each curve's formula is written here
// once; a row of FS_CURVES or FS_NODE_KINDS without its type does not compile.
#pragma once

#include "mathlib.h"
#include "program.h"

FS_NAMESPACE_BEGIN

FS_HD_CALL double clamp(double value, double low, double high) {
  return value < low ? low : (value > high ? high : value);  // a NaN stays one
}

// The order of operations is the libraries' own: a reciprocal instead of the division puts one stair in
// seventeen at the wrong step, and x * stairs / divisor is exact where x / divisor * stairs is not.
FS_HD_CALL double curve_argument(const Node& node, double t) {
  const CurveParameters& c = node.as_curve;
  double x = t - c.origin;
  if (x > c.limit) x = c.limit;
  double u = c.stairs > 0.0 ? floor(x * c.stairs / c.divisor) / c.stairs : x / c.divisor;
  if (c.repeats > 0.0) {
    u *= c.repeats;
    u -= floor(u);
  }
  u = power(u, c.exponent);
  return node.complement ? 1.0 - u : u;
}

// The shapes. `table` is the node's own part of the table.
struct ConstantCurve {
  static FS_HD_CALL double shape(const Node&, double, const double*) { return 1.0; }
};
struct PowerCurve {
  static FS_HD_CALL double shape(const Node& node, double u, const double*) { return power(u, node.as_curve.p); }
};
struct CosineCurve {
  static FS_HD_CALL double shape(const Node& node, double u, const double*) {
    return power(0.5 * (1.0 + cos_pi(node.as_curve.p * u)), node.as_curve.q);
  }
};
struct ExponentialCurve {
  static FS_HD_CALL double shape(const Node& node, double u, const double*) { return power(node.as_curve.p, u); }
};
struct LogarithmCurve {
  static FS_HD_CALL double shape(const Node& node, double u, const double*) { return node.as_curve.p * logarithm(u); }
};
struct TanhCurve {
  static FS_HD_CALL double shape(const Node& node, double u, const double*) {
    const CurveParameters& c = node.as_curve;
    return 0.5 * (1.0 - hyperbolic_tangent(c.p + (c.q - c.p) * u));
  }
};
struct TableCurve {
  static FS_HD_CALL double shape(const Node& node, double u, const double* table) {
    double index = floor(u);
    if (!(index > 0.0)) index = 0.0;  // a NaN included: it must not become an address
    const double last = static_cast<double>(node.table_length - 1);
    return table[static_cast<int64_t>(index > last ? last : index)];
  }
};

// Level i while u < end i: the table holds the n-1 ends, then the n values. A node of 128 bytes per level, as a join
// of constants would have, is too much for a hundred milestones.
struct LevelsCurve {
  static FS_HD_CALL double shape(const Node& node, double u, const double* table) {
    const int32_t num_ends = node.table_length / 2;
    int32_t low = 0;
    int32_t high = num_ends;
    while (low < high) {  // the first end above u
      const int32_t middle = (low + high) / 2;
      if (u < table[middle]) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return table[num_ends + low];
  }
};

// A node whose value is computed from its children's: what it needs when it is returned to.
struct Frame {
  int32_t node;
  int32_t next_child;
  double t;  // the node's clock
  double accumulated;
};

// Where the evaluation stands: at `node` on clock `t`, or, when node is kReturned, with `value` in hand.
constexpr int32_t kReturned = -1;

struct Walk {
  const Node* nodes;
  const double* table;
  int32_t node;
  int32_t depth;
  double t;
  double value;
  Frame stack[kMaxDepth];

  FS_HD_CALL void push(double accumulated) {
    stack[depth] = {node, nodes[node + 1].end, t, accumulated};
    ++depth;
  }
  FS_HD_CALL void pop() {
    --depth;
    node = kReturned;
  }
  // To the next child of the frame on top, or out of it with what was accumulated.
  FS_HD_CALL void advance(Frame& frame) {
    if (frame.next_child == nodes[frame.node].end) {
      value = frame.accumulated;
      pop();
      return;
    }
    node = frame.next_child;
    t = frame.t;
    frame.next_child = nodes[node].end;
  }
};

// The rules of each kind: enter moves the walk into a child (or to a value), leave takes a child's value and
// is called only where enter pushed a frame.
struct WithoutFrame {
  static FS_HD_CALL void leave(Walk&, Frame&, const Node&) {}
};

struct CurveNode : WithoutFrame {
  static FS_HD_CALL void enter(Walk& walk, const Node& node);  // below: it needs the dispatch over curves
};

// Child i while t < end i, on the clock t - origin i. The table holds the n-1 ends, then the n origins: ends
// and origins differ where a bound is inclusive (an end of nextafter(e) for t <= e) or phases share a clock.
struct JoinNode : WithoutFrame {
  static FS_HD_CALL void enter(Walk& walk, const Node& node) {
    const double* ends = walk.table + node.table_begin;
    const int32_t last = node.num_children - 1;
    int32_t child = walk.node + 1;
    int32_t i = 0;
    while (i < last && !(walk.t < ends[i])) {
      child = walk.nodes[child].end;
      ++i;
    }
    walk.t -= ends[last + i];
    walk.node = child;
  }
};

struct ProductNode {
  static FS_HD_CALL void enter(Walk& walk, const Node&) {
    walk.push(1.0);
    ++walk.node;
  }
  static FS_HD_CALL void leave(Walk& walk, Frame& frame, const Node&) {
    frame.accumulated *= walk.value;
    walk.advance(frame);
  }
};

struct SumNode {
  static FS_HD_CALL void enter(Walk& walk, const Node&) {
    walk.push(0.0);
    ++walk.node;
  }
  static FS_HD_CALL void leave(Walk& walk, Frame& frame, const Node&) {
    frame.accumulated += walk.value;
    walk.advance(frame);
  }
};

// The cycle is found by division, or by subtraction where cycles grow: a logarithm would put one exact
// restart in nineteen at the end of the cycle before.
struct RepeatNode {
  static FS_HD_CALL void enter(Walk& walk, const Node& node) {
    const RepeatParameters& r = node.as_repeat;
    double cycle = 0.0;
    double x = walk.t;  // inside the cycle
    double stretch = 1.0;
    if (r.growth == 1.0) {
      cycle = floor(x / r.period);
      x -= cycle * r.period;
      if (x < 0.0) {  // the division was rounded up to a whole number
        x += r.period;
        cycle -= 1.0;
      }
      if (r.times > 0.0 && cycle >= r.times) {
        cycle = r.times - 1.0;
        x = r.period;
      }
    } else {
      const double last = r.times > 0.0 ? r.times - 1.0 : kMaxCycles;
      double length = r.period;
      while (x >= length && cycle < last) {
        x -= length;
        length *= r.growth;
        stretch *= r.growth;
        cycle += 1.0;
      }
      x /= stretch;
      if (r.times > 0.0 && x > r.period) x = r.period;
    }
    if (r.gain != 1.0) walk.push(power(r.gain, cycle));
    walk.t = x;
    ++walk.node;
  }
  static FS_HD_CALL void leave(Walk& walk, Frame& frame, const Node&) {
    walk.value *= frame.accumulated;
    walk.pop();
  }
};

struct ClockNode : WithoutFrame {
  static FS_HD_CALL void enter(Walk& walk, const Node& node) {
    const ClockParameters& c = node.as_clock;
    double t = c.multiplier * walk.t + c.addend;
    if (t < 0.0) t = 0.0;
    walk.t = c.every > 0.0 ? floor(t / c.every) : t;
    ++walk.node;
  }
};

struct ClampNode {
  static FS_HD_CALL void enter(Walk& walk, const Node&) {
    walk.push(0.0);
    ++walk.node;
  }
  static FS_HD_CALL void leave(Walk& walk, Frame&, const Node& node) {
    const ClampParameters& c = node.as_clamp;
    walk.value = clamp(c.offset + c.scale * walk.value, c.low, c.high);
    walk.pop();
  }
};

FS_HD_CALL double curve_shape(const Node& node, double u, const double* table) {
  switch (node.curve) {
#define FS_CASE(identifier, tag, name, type) \
  case identifier: return type::shape(node, u, table);
    FS_CURVES(FS_CASE)
#undef FS_CASE
    default: return not_a_number();
  }
}

FS_HD_CALL void CurveNode::enter(Walk& walk, const Node& node) {
  const CurveParameters& c = node.as_curve;
  const double shape = curve_shape(node, curve_argument(node, walk.t), walk.table + node.table_begin);
  walk.value = clamp(c.offset + c.scale * shape, c.low, c.high);
  walk.node = kReturned;
}

FS_HD_CALL void enter_node(Walk& walk) {
  const Node& node = walk.nodes[walk.node];
  switch (node.kind) {
#define FS_CASE(identifier, tag, name, type) \
  case identifier: return type::enter(walk, node);
    FS_NODE_KINDS(FS_CASE)
#undef FS_CASE
    default: walk.value = not_a_number(); walk.node = kReturned;
  }
}

FS_HD_CALL void leave_node(Walk& walk) {
  Frame& frame = walk.stack[walk.depth - 1];
  const Node& node = walk.nodes[frame.node];
  switch (node.kind) {
#define FS_CASE(identifier, tag, name, type) \
  case identifier: return type::leave(walk, frame, node);
    FS_NODE_KINDS(FS_CASE)
#undef FS_CASE
    default: walk.pop();
  }
}

// The value of a validated, 8-byte aligned program at time t (0-based index of the update).
FS_HD_CALL double evaluate(const unsigned char* program, double t) {
  const ProgramHeader& header = *reinterpret_cast<const ProgramHeader*>(program);
  Walk walk;
  walk.nodes = reinterpret_cast<const Node*>(program + sizeof(ProgramHeader));
  walk.table = reinterpret_cast<const double*>(walk.nodes + header.num_nodes);
  walk.node = 0;
  walk.depth = 0;
  walk.t = t;
  for (;;) {
    while (walk.node != kReturned) enter_node(walk);
    while (walk.node == kReturned) {
      if (walk.depth == 0) return walk.value;
      leave_node(walk);
    }
  }
}

FS_NAMESPACE_END
