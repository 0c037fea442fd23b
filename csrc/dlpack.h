// The part of DLPack through which torch says where a tensor lies without its headers and without a Python object:
// the layout of include/dlpack/dlpack.h 1.3 (github.com/dmlc/dlpack), which a test compares with torch's copy.
// torch has it since 2.10, as `torch.Tensor.__dlpack_c_exchange_api__`, a capsule that points to a DLPackExchangeAPI.
#pragma once

#include <stdint.h>

namespace fused_sched {

struct DLPackVersion {
  uint32_t major;
  uint32_t minor;
};

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  DLPackVersion version;  // the layout is that of one major version
  DLPackExchangeAPI* prev_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // Borrows: what it fills in is valid while the tensor is left alone. 0, or -1 with a Python exception set. May be
  // null.
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  void* current_work_stream;
};

constexpr uint32_t kDLPackMajorVersion = 1;

}  // namespace fused_sched
