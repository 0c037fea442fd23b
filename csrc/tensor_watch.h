// Whether the tensors of a step are those of the last one, and where their gradients are now: the only work per
// parameter that a steady step has in Python. It says yes only to what it knows for sure; everything else (and every
// error) is left to the checks of packing.py.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "prefetch.h"
#include "step.h"

namespace fused_sched {

namespace py = pybind11;

// An owned reference to the target of a weak one, or null.
inline py::object weakref_target(const py::object& reference) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* target = nullptr;
  PyWeakref_GetRef(reference.ptr(), &target);
  return py::reinterpret_steal<py::object>(target);
#else
  PyObject* const target = PyWeakref_GetObject(reference.ptr());
  return target == Py_None ? py::object() : py::reinterpret_borrow<py::object>(target);
#endif
}

// An attribute, or null where there is none; an exception is set only where looking it up failed.
inline py::object optional_attribute(PyObject* object, PyObject* name) {
  PyObject* value = nullptr;
#if PY_VERSION_HEX >= 0x030D0000
  PyObject_GetOptionalAttr(object, name, &value);
#else
  _PyObject_LookupAttr(object, name, &value);
#endif
  return py::reinterpret_steal<py::object>(value);
}

// The tensors are borrowed: whoever holds a watch keeps the parameters with a gradient alive, and the table's rows.
class TensorWatch {
 public:
  // api: torch's, a capsule. is_neg: torch.Tensor.is_neg.
  TensorWatch(const py::capsule& api, py::type tensor, py::type parameter, py::object is_neg)
      : tensor_type_(std::move(tensor)), parameter_type_(std::move(parameter)), is_neg_(std::move(is_neg)) {
    api_ = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
    if (api_ == nullptr) throw py::error_already_set();
    if (api_->version.major != kDLPackMajorVersion || api_->dltensor_from_py_object_no_sync == nullptr) {
      throw py::value_error("the DLPack exchange API has another version than this build reads");
    }
  }

  // Remembers the groups and their tensors as they are now. rows: for each parameter the address of its row of the
  // tensor table, 0 for one without a gradient. False if there is a tensor that it cannot judge.
  bool remember(const py::list& groups, const std::vector<uint64_t>& rows) {
    groups_.clear();
    tensors_.clear();
    dimensions_.clear();
    for (const py::handle group : groups) {
      const py::object params = params_of(group.ptr());
      if (!params) return false;
      const size_t num_before = tensors_.size();
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
        if (tensors_.size() >= rows.size()) return false;
        Watched watched = {};
        const py::object param = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(params.ptr(), i));
        watched.param = param.ptr();
        watched.row = reinterpret_cast<fs_tensor*>(rows[tensors_.size()]);
        if (!remember_tensors(watched)) return forgive();
        tensors_.push_back(std::move(watched));
      }
      groups_.push_back({group.ptr(), static_cast<Py_ssize_t>(tensors_.size() - num_before)});
    }
    return tensors_.size() == rows.size();
  }

  // Watches a tensor of the state, too, which somebody may point elsewhere by its `.data`. address: where it belongs.
  void add_state(const py::object& tensor, uint64_t address) {
    PyObject* const reference = PyWeakref_NewRef(tensor.ptr(), nullptr);
    if (reference == nullptr) throw py::error_already_set();
    state_[tensor.ptr()] = {py::reinterpret_steal<py::object>(reference), address};
  }

  // Whether these groups hold what was remembered, all where it was but the gradients, whose addresses the rows get.
  // They are then held until release(): hooks, and other threads while the kernels run, may drop them.
  bool repeats(const py::list& groups) {
    const bool repeated = compare(groups);
    if (!repeated) release();
    return repeated;
  }

  void release() { held_.clear(); }

 private:
  bool compare(const py::list& groups) {
    if (groups.size() != groups_.size()) return false;
    size_t index = 0;
    for (size_t i = 0; i < groups_.size() && i < groups.size(); ++i) {
      PyObject* const group = PyList_GET_ITEM(groups.ptr(), static_cast<Py_ssize_t>(i));
      const py::object params = group == groups_[i].dict ? params_of(group) : py::object();
      if (!params) return false;
      // The list is held and its size read every time: what p.grad runs may be anybody's.
      for (Py_ssize_t j = 0; j < groups_[i].num_params; ++j) {
        if (PyList_GET_SIZE(params.ptr()) != groups_[i].num_params) return false;
        if (index + kAhead < tensors_.size()) ask_for(tensors_[index + kAhead]);
        Watched& watched = tensors_[index++];
        if (PyList_GET_ITEM(params.ptr(), j) != watched.param) return false;
        if (!stays(watched)) return forgive();
      }
      if (PyList_GET_SIZE(params.ptr()) != groups_[i].num_params) return false;
    }
    return state_stays() || forgive();
  }

  struct Group {
    PyObject* dict;
    Py_ssize_t num_params;
  };

  // What must stay of a tensor beside its shape. `strides`: their place in dimensions_.
  struct View {
    DLDevice device;
    DLDataType dtype;
    size_t strides;
  };

  struct Watched {
    PyObject* param;
    fs_tensor* row;  // null: has no gradient
    void* param_data;
    int32_t ndim;
    size_t shape;  // its place in dimensions_
    View param_view;
    View grad_view;
    const int64_t* param_shape;  // where torch had it; for asking ahead
    const int64_t* grad_shape;
    PyObject* latest_grad;  // compared only
    py::object known_grad;  // a weak reference to one that is known not to be lazily negated,
    void* known_data;       // and where it was then
  };

  struct State {
    py::object reference;  // weak
    uint64_t address;
  };

  // Tensors between the one that is compared and the one whose objects are asked for. Where 300 are in no cache,
  // comparing them takes 151 us, without asking 216 (Zen 5; in caches 26). 3 ahead are as good, 10 take a tenth longer.
  static constexpr size_t kAhead = 6;

  // By what is known of the last step. torch keeps a tensor's shape amid what else is read of it.
  static FS_HD void ask_for(const Watched& watched) {
    prefetch(watched.param, sizeof(PyObject));
    if (watched.row == nullptr) return;
    prefetch(watched.latest_grad, sizeof(PyObject));
    prefetch(reinterpret_cast<const void*>(reinterpret_cast<uint64_t>(watched.param_shape) - 64), 192);
    prefetch(reinterpret_cast<const void*>(reinterpret_cast<uint64_t>(watched.grad_shape) - 64), 192);
  }

  // The list of a group's parameters; null where it is anything else.
  static py::object params_of(PyObject* group) {
    static PyObject* const key = PyUnicode_InternFromString("params");
    PyObject* const params = PyDict_Check(group) ? PyDict_GetItemWithError(group, key) : nullptr;
    if (params == nullptr) PyErr_Clear();
    if (params == nullptr || !PyList_Check(params)) return py::object();
    return py::reinterpret_borrow<py::object>(params);
  }

  // Whatever went wrong, the checks in Python will say it.
  static bool forgive() {
    PyErr_Clear();
    return false;
  }

  // What a step would take as the gradient; null for none, or with an exception set.
  static py::object gradient_of(PyObject* param) {
    static PyObject* const grad = PyUnicode_InternFromString("grad");
    static PyObject* const main_grad = PyUnicode_InternFromString("main_grad");
    py::object value = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, grad));
    if (!value || !value.is_none()) return value;
    value = optional_attribute(param, main_grad);
    return value && value.is_none() ? py::object() : value;
  }

  // Only the plain types: what a subclass says of itself, Python must ask.
  bool is_plain_tensor(PyObject* object) const { return py::type::handle_of(object).is(tensor_type_); }
  bool is_plain_param(PyObject* object) const {
    return py::type::handle_of(object).is(parameter_type_) || is_plain_tensor(object);
  }

  bool describe(PyObject* tensor, DLTensor& out) const {
    return api_->dltensor_from_py_object_no_sync(tensor, &out) == 0;
  }

  // Lazily negated: its value is not what its memory holds.
  bool is_negated(PyObject* tensor, bool& negated) const {
    const py::object result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg_.ptr(), tensor));
    negated = result.ptr() != Py_False;
    return static_cast<bool>(result);
  }

  bool remember_tensors(Watched& watched) {
    if (!is_plain_param(watched.param)) return false;
    const py::object grad = gradient_of(watched.param);
    if (watched.row == nullptr) return !grad && PyErr_Occurred() == nullptr;
    if (!grad || !is_plain_tensor(grad.ptr())) return false;
    bool negated = true;
    if (!is_negated(watched.param, negated) || negated || !is_negated(grad.ptr(), negated) || negated) return false;
    DLTensor param, gradient;
    if (!describe(watched.param, param) || !describe(grad.ptr(), gradient) || param.ndim != gradient.ndim) return false;
    watched.param_data = param.data;
    watched.param_shape = param.shape;
    watched.grad_shape = gradient.shape;
    watched.ndim = param.ndim;
    watched.shape = keep(param.shape, param.ndim);
    watched.param_view = {param.device, param.dtype, keep(param.strides, param.ndim)};
    watched.grad_view = {gradient.device, gradient.dtype, keep(gradient.strides, param.ndim)};
    watched.latest_grad = grad.ptr();
    return looks_alike(param, watched, watched.param_view) && looks_alike(gradient, watched, watched.grad_view);
  }

  size_t keep(const int64_t* values, int32_t count) {
    const size_t place = dimensions_.size();
    dimensions_.insert(dimensions_.end(), values, values + count);
    return place;
  }

  bool looks_alike(const DLTensor& tensor, const Watched& watched, const View& view) const {
    if (tensor.device.device_type != view.device.device_type || tensor.device.device_id != view.device.device_id ||
        tensor.dtype.code != view.dtype.code || tensor.dtype.bits != view.dtype.bits ||
        tensor.dtype.lanes != view.dtype.lanes || tensor.ndim != watched.ndim) {
      return false;
    }
    bool is_empty = false;
    for (int32_t i = 0; i < watched.ndim; ++i) {
      const size_t place = static_cast<size_t>(i);
      if (tensor.shape[i] != dimensions_[watched.shape + place]) return false;
      if (tensor.strides[i] != dimensions_[view.strides + place]) return false;
      is_empty |= tensor.shape[i] == 0;
    }
    // No memory: a zero tensor, or one whose storage was freed.
    return tensor.byte_offset == 0 && (tensor.data != nullptr || is_empty);
  }

  bool stays(Watched& watched) {
    const py::object param = py::reinterpret_borrow<py::object>(watched.param);
    if (!is_plain_param(watched.param)) return false;
    py::object grad = gradient_of(watched.param);
    if (watched.row == nullptr) return !grad && PyErr_Occurred() == nullptr;
    if (!grad || !is_plain_tensor(grad.ptr())) return false;
    DLTensor tensor;
    // Where a parameter has moved, it may lie on another one. In its old place it cannot have become lazily negated,
    // but by assigning `.data` the negation of its own memory, which only the private torch._neg_view gives.
    if (!describe(watched.param, tensor) || tensor.data != watched.param_data) return false;
    if (!looks_alike(tensor, watched, watched.param_view)) return false;
    if (!describe(grad.ptr(), tensor) || !looks_alike(tensor, watched, watched.grad_view)) return false;
    if (!is_known(grad, tensor.data, watched)) return false;
    watched.row->grad = reinterpret_cast<uint64_t>(tensor.data);
    watched.grad_shape = tensor.shape;
    held_.push_back(std::move(grad));
    return true;
  }

  // Whether a gradient is not lazily negated. Asking costs as much as all the rest, and lets other threads take the
  // interpreter; so one that stays is asked twice, and known by a weak reference from then on, until its `.data` is
  // set to something elsewhere, which may be negated.
  bool is_known(const py::object& grad, void* data, Watched& watched) const {
    if (watched.known_data == data && watched.known_grad && weakref_target(watched.known_grad).is(grad)) return true;
    bool negated = true;
    if (!is_negated(grad.ptr(), negated) || negated) return false;
    if (watched.latest_grad == grad.ptr()) {
      watched.known_grad = py::reinterpret_steal<py::object>(PyWeakref_NewRef(grad.ptr(), nullptr));
      watched.known_data = data;
    }
    watched.latest_grad = grad.ptr();
    return PyErr_Occurred() == nullptr;
  }

  // Tensors of the state that nobody else holds any more need no watching.
  bool state_stays() {
    for (auto item = state_.begin(); item != state_.end();) {
      const py::object tensor = weakref_target(item->second.reference);
      if (tensor) {
        DLTensor view;
        if (!describe(tensor.ptr(), view) || reinterpret_cast<uint64_t>(view.data) != item->second.address)
          return false;
      }
      constexpr Py_ssize_t kOurReferences = 3;  // the entry's, the user's dict's, and the one just taken
      item = !tensor || Py_REFCNT(tensor.ptr()) <= kOurReferences ? state_.erase(item) : std::next(item);
    }
    return true;
  }

  const DLPackExchangeAPI* api_;
  py::type tensor_type_;
  py::type parameter_type_;
  py::object is_neg_;
  std::vector<Group> groups_;
  std::vector<Watched> tensors_;
  std::vector<int64_t> dimensions_;  // shapes and strides
  std::vector<py::object> held_;     // gradients of the step that is going on
  std::unordered_map<PyObject*, State> state_;
};

}  // namespace fused_sched
