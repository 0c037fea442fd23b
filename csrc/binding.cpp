// The Python module over step.h, compiled once per backend (FS_MODULE is _cpu, _cuda or a test's name).
// Tensors are checked in Python; what arrives here are addresses and sizes. The tables of the core are
// exported by walking them, so that Python holds no second list of tags or field offsets.

// The checks would take a tenth of the time of tensor_watch.h, which runs with the interpreter held.
#define PYBIND11_NO_ASSERT_GIL_HELD_INCREF_DECREF
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "float_environment.h"
#include "norm_chunks.h"
#include "step.h"
#include "tensor_watch.h"

// 1 when FS_MODULE is _cpu.
#define FS_IS__cpu 1
#define FS_CONCATENATE(a, b) a##b
#define FS_MODULE_IS(prefix, module) FS_CONCATENATE(prefix, module)
#if FS_MODULE_IS(FS_IS_, FS_MODULE)
#define FS_CPU_MODULE 1
#include "cpu/isa.h"
#endif

namespace py = pybind11;
using namespace fused_sched;

namespace {

// NumPy's name for a field's type.
template <class T>
std::string dtype_of() {
  const char kind = std::is_floating_point<T>::value ? 'f' : std::is_signed<T>::value ? 'i' : 'u';
  return std::string("<") + kind + std::to_string(sizeof(T));
}

#define FS_FIELD(Type, field) \
  py::make_tuple(#field, dtype_of<decltype(Type::field)>(), static_cast<int>(offsetof(Type, field)))

// (itemsize, [(field, NumPy dtype, offset)])
template <class... Fields>
py::tuple layout(size_t itemsize, Fields... fields) {
  return py::make_tuple(static_cast<int>(itemsize), py::list(py::make_tuple(fields...)));
}

// The fields of a Hyperparameter that lies at `offset` in its group, named as in "lr.scale".
void append_hyperparameter(py::list& fields, const std::string& name, size_t offset) {
  const py::tuple own =
      layout(sizeof(Hyperparameter), FS_FIELD(Hyperparameter, scale), FS_FIELD(Hyperparameter, program),
             FS_FIELD(Hyperparameter, tensor), FS_FIELD(Hyperparameter, tensor_format));
  for (py::handle item : own[1]) {
    const py::tuple field = py::reinterpret_borrow<py::tuple>(item);
    fields.append(py::make_tuple(name + "." + field[0].cast<std::string>(), field[1],
                                 field[2].cast<int>() + static_cast<int>(offset)));
  }
}

// struct name -> layout
py::dict layouts() {
  py::dict all;
  all["tensor"] = layout(sizeof(fs_tensor), FS_FIELD(fs_tensor, param), FS_FIELD(fs_tensor, grad),
                         FS_FIELD(fs_tensor, step), FS_FIELD(fs_tensor, numel), FS_FIELD(fs_tensor, state_offset),
                         FS_FIELD(fs_tensor, arena), FS_FIELD(fs_tensor, group), FS_FIELD(fs_tensor, ordinal),
                         FS_FIELD(fs_tensor, param_format), FS_FIELD(fs_tensor, grad_format),
                         FS_FIELD(fs_tensor, master), FS_FIELD(fs_tensor, moments), FS_FIELD(fs_tensor, amsgrad));
  all["clock"] = layout(sizeof(Clock), FS_FIELD(Clock, step), FS_FIELD(Clock, tick_pending), FS_FIELD(Clock, skipped));
  all["step_record"] = layout(sizeof(StepRecord), FS_FIELD(StepRecord, count), FS_FIELD(StepRecord, mirror));
  const py::tuple group = layout(sizeof(GroupRecord), FS_FIELD(GroupRecord, eps), FS_FIELD(GroupRecord, grad_divisor),
                                 FS_FIELD(GroupRecord, flags));
  py::list group_fields = group[1];
  append_hyperparameter(group_fields, "lr", offsetof(GroupRecord, lr));
  append_hyperparameter(group_fields, "beta1", offsetof(GroupRecord, beta1));
  append_hyperparameter(group_fields, "beta2", offsetof(GroupRecord, beta2));
  append_hyperparameter(group_fields, "weight_decay", offsetof(GroupRecord, weight_decay));
  all["group"] = group;
  all["values"] = layout(sizeof(GroupValues), FS_FIELD(GroupValues, lr), FS_FIELD(GroupValues, beta1),
                         FS_FIELD(GroupValues, beta2), FS_FIELD(GroupValues, weight_decay));
  all["norm"] =
      layout(sizeof(NormState), FS_FIELD(NormState, max_norm), FS_FIELD(NormState, grad_divisor),
             FS_FIELD(NormState, squares), FS_FIELD(NormState, sum_root), FS_FIELD(NormState, norm),
             FS_FIELD(NormState, clip), FS_FIELD(NormState, skip_nonfinite), FS_FIELD(NormState, blocks_done));
  all["square_sum"] =
      layout(sizeof(SquareSum), FS_FIELD(SquareSum, middle), FS_FIELD(SquareSum, large), FS_FIELD(SquareSum, small));
  all["history"] = layout(sizeof(History), FS_FIELD(History, rows), FS_FIELD(History, row_length),
                          FS_FIELD(History, num_groups), FS_FIELD(History, count), FS_FIELD(History, row));
  all["arena"] = layout(sizeof(fs_arena));
  all["scalars"] = layout(sizeof(ScalarSlot));
  all["metric_rule"] =
      layout(sizeof(MetricRule), FS_FIELD(MetricRule, kind), FS_FIELD(MetricRule, maximize),
             FS_FIELD(MetricRule, relative), FS_FIELD(MetricRule, window), FS_FIELD(MetricRule, base_lr),
             FS_FIELD(MetricRule, factor), FS_FIELD(MetricRule, patience), FS_FIELD(MetricRule, threshold),
             FS_FIELD(MetricRule, cooldown), FS_FIELD(MetricRule, warmup), FS_FIELD(MetricRule, min_lr),
             FS_FIELD(MetricRule, max_lr), FS_FIELD(MetricRule, eps), FS_FIELD(MetricRule, reset_start));
  all["plateau_state"] = layout(sizeof(PlateauState), FS_FIELD(PlateauState, lr), FS_FIELD(PlateauState, best),
                                FS_FIELD(PlateauState, num_bad), FS_FIELD(PlateauState, cooldown_left));
  all["greedy_state"] =
      layout(sizeof(GreedyState), FS_FIELD(GreedyState, lr), FS_FIELD(GreedyState, best),
             FS_FIELD(GreedyState, num_bad), FS_FIELD(GreedyState, cooldown_left), FS_FIELD(GreedyState, num_good),
             FS_FIELD(GreedyState, warmup_left), FS_FIELD(GreedyState, resets_left), FS_FIELD(GreedyState, window_sum),
             FS_FIELD(GreedyState, window_length), FS_FIELD(GreedyState, window_oldest));
  return all;
}

template <class Work>
void run(Work work) {
  char error[kErrorSize] = "unknown error";
  int status;
  {
    py::gil_scoped_release release;
    status = work(error);
  }
  if (status != 0) throw std::runtime_error(std::string("fused_sched: ") + error);
}

// float64 steps in, float64 values out; addresses of count contiguous elements.
void evaluate_program(const py::bytes& program, uint64_t steps, uint64_t values, int64_t count) {
  char* bytes;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(program.ptr(), &bytes, &size) != 0) throw py::error_already_set();
  if (const char* problem = validate_program(reinterpret_cast<const unsigned char*>(bytes), size)) {
    throw py::value_error(std::string("invalid schedule program: ") + problem);
  }
  const double* in = reinterpret_cast<const double*>(steps);
  double* out = reinterpret_cast<double*>(values);
  py::gil_scoped_release release;
  const DefaultFloatEnvironment environment;
  for (int64_t i = 0; i < count; ++i) out[i] = evaluate(reinterpret_cast<const unsigned char*>(bytes), in[i]);
}

// metrics and rates: addresses of count doubles. Advances the state; rate i is the one before metric i is reported.
void replay_metrics(const py::bytes& rule, uint64_t state, uint64_t metrics, uint64_t rates, int64_t count) {
  const std::string bytes = rule;
  MetricRecord record;
  if (bytes.size() != sizeof record.rule) throw py::value_error("a metric rule has another size than this build reads");
  memcpy(&record.rule, bytes.data(), sizeof record.rule);
  record.state = state;
  const double* in = reinterpret_cast<const double*>(metrics);
  double* out = reinterpret_cast<double*>(rates);
  py::gil_scoped_release release;
  const DefaultFloatEnvironment environment;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = *reinterpret_cast<const double*>(state);
    report_metric(record, in[i]);
  }
}

}  // namespace

PYBIND11_MODULE(FS_MODULE, module) {
  module.doc() = "fused_sched's compiled backend: see csrc/step.h for what the fields of a Call mean.";

  // Addresses and counts as Python integers.
#define FS_ADDRESS(field)                                                                 \
  def_property(                                                                           \
      #field, [](const fs_call& call) { return reinterpret_cast<uint64_t>(call.field); }, \
      [](fs_call& call, uint64_t address) { call.field = reinterpret_cast<decltype(call.field)>(address); })
  py::class_<fs_call>(module, "Call", py::module_local())
      .def(py::init([] { return new fs_call{}; }))
      .FS_ADDRESS(tensors)
      .FS_ADDRESS(arenas)
      .FS_ADDRESS(clock)
      .FS_ADDRESS(groups)
      .FS_ADDRESS(values)
      .FS_ADDRESS(scalars)
      .FS_ADDRESS(found_inf)
      .FS_ADDRESS(grad_scale)
      .FS_ADDRESS(norm)
      .FS_ADDRESS(chunk_sums)
      .FS_ADDRESS(history)
      .def_readwrite("seed", &fs_call::seed)
      .def_readwrite("num_tensors", &fs_call::num_tensors)
      .def_readwrite("num_arenas", &fs_call::num_arenas)
      .def_readwrite("num_groups", &fs_call::num_groups)
      .def_readwrite("norm_is_reduced", &fs_call::norm_is_reduced)
      .def_readwrite("tick", &fs_call::tick)
      .def_readwrite("device", &fs_call::device)
      .def_readwrite("stream", &fs_call::stream)
      .def_readwrite("num_threads", &fs_call::num_threads)
      .def_readwrite("launches", &fs_call::launches);
#undef FS_ADDRESS

  py::class_<TensorWatch>(module, "TensorWatch", py::module_local())
      .def(py::init<const py::capsule&, py::type, py::type, py::object>(), py::arg("api"), py::arg("tensor_type"),
           py::arg("parameter_type"), py::arg("is_neg"))
      .def("remember", &TensorWatch::remember, py::arg("groups"), py::arg("rows"))
      .def("add_state", &TensorWatch::add_state, py::arg("tensor"), py::arg("address"))
      .def("repeats", &TensorWatch::repeats, py::arg("groups"))
      .def("release", &TensorWatch::release);

  module.def("norm", [](fs_call& call) { run([&](char* error) { return fs_norm(&call, error); }); });
  module.def("num_norm_chunks", [](const fs_call& call) { return num_norm_chunks(call); });
  module.def("clock", [](fs_call& call) { run([&](char* error) { return fs_clock(&call, error); }); });
  module.def("update", [](fs_call& call) { run([&](char* error) { return fs_update(&call, error); }); });
  module.def("step", [](fs_call& call) {
    call.launches = 0;
    run([&](char* error) {
      const int status = call.norm != nullptr ? fs_norm(&call, error) : fs_clock(&call, error);
      return status != 0 ? status : fs_update(&call, error);
    });
  });
  module.def(
      "report_metric",
      [](uint64_t metric, uint64_t records, int64_t num_records, int device, uint64_t stream) {
        const fs_report report = {reinterpret_cast<const double*>(metric),
                                  reinterpret_cast<const MetricRecord*>(records), num_records, stream, device};
        run([&](char* error) { return fs_report_metric(&report, error); });
      },
      py::arg("metric"), py::arg("records"), py::arg("num_records"), py::arg("device"), py::arg("stream"));
  module.def("device_count", [] {
    int count = 0;
    run([&](char* error) { return fs_device_count(&count, error); });
    return count;
  });
  module.def("evaluate", &evaluate_program, py::arg("program"), py::arg("steps"), py::arg("values"), py::arg("count"));
  module.def("replay_metrics", &replay_metrics, py::arg("rule"), py::arg("state"), py::arg("metrics"), py::arg("rates"),
             py::arg("count"));

#define FS_EXPORT(identifier, tag, name, ...) table[name] = tag;
  py::dict table;
  FS_FORMATS(FS_EXPORT)
  module.attr("FORMATS") = table;
  table = py::dict();
  FS_MASTERS(FS_EXPORT)
  module.attr("MASTERS") = table;
  table = py::dict();
  FS_MOMENTS(FS_EXPORT)
  module.attr("MOMENTS") = table;
  table = py::dict();
  FS_CURVES(FS_EXPORT)
  module.attr("CURVES") = table;
  table = py::dict();
  FS_NODE_KINDS(FS_EXPORT)
  module.attr("NODE_KINDS") = table;
  table = py::dict();
  FS_METRIC_RULES(FS_EXPORT)
  module.attr("METRIC_RULES") = table;
#undef FS_EXPORT
  // Bytes per element of what each format keeps, and elements per byte of scale (0: none).
  table = py::dict();
#define FS_EXPORT_MASTER(identifier, tag, name, ...) table[name] = kMasterBytes[identifier];
  FS_MASTERS(FS_EXPORT_MASTER)
#undef FS_EXPORT_MASTER
  module.attr("MASTER_BYTES") = table;
  table = py::dict();
#define FS_EXPORT_MOMENTS(identifier, tag, name, ...) \
  table[name] = py::make_tuple(kMomentBytes[identifier], kScaleGroup[identifier]);
  FS_MOMENTS(FS_EXPORT_MOMENTS)
#undef FS_EXPORT_MOMENTS
  module.attr("MOMENT_BYTES") = table;
  module.attr("LAYOUTS") = layouts();
  module.attr("HISTORY_LENGTH") = static_cast<int>(kHistoryLength);
  module.attr("HISTORY_COLUMNS") = py::make_tuple("clock", "grad_norm", "clip", "skipped");
  module.attr("PADDING") = static_cast<int>(kPadding);
  module.attr("SLOTS") =
      py::make_tuple("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "exp_avg_scale", "exp_avg_sq_scale");
  module.attr("GROUP_FLAGS") = py::dict(py::arg("decoupled") = static_cast<int>(kGroupDecoupled),
                                        py::arg("maximize") = static_cast<int>(kGroupMaximize));

#if defined(FS_CPU_MODULE)
  module.def("instruction_sets", [] {
    py::list sets;
    for (int i = 0; i < kNumInstructionSets; ++i) {
      sets.append(py::make_tuple(kInstructionSets[i].name, kInstructionSets[i].supported()));
    }
    return sets;
  });
  module.def("instruction_set", [] { return instruction_set().name; });
  module.def("set_instruction_set", [](const std::string& name) {
    if (!set_instruction_set(name.c_str())) {
      throw py::value_error("instruction set must be one that instruction_sets() lists as supported, got " + name);
    }
  });
#endif
}
