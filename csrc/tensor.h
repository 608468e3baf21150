// SPDX-License-Identifier: Apache-2.0
// Tensors that Python hands to a launch, checked. They are read through Python's attributes: torch's
// headers would take a hundred times longer to compile than everything that includes this.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace comet_ds {

namespace py = pybind11;

// A torch dtype by its name, such as "bfloat16"; looked up once.
class TorchDtype {
  public:
    explicit TorchDtype(const char* name)
        : dtype_(py::object(py::module_::import("torch").attr(name)).release().ptr()) {}
    bool is(const py::handle& dtype) const { return dtype.ptr() == dtype_; }
    std::string name() const { return py::str(py::handle(dtype_)); }

  private:
    PyObject* dtype_;  // torch keeps it
};

inline const TorchDtype& bfloat16_dtype() {
    static const TorchDtype dtype("bfloat16");
    return dtype;
}
inline const TorchDtype& float16_dtype() {
    static const TorchDtype dtype("float16");
    return dtype;
}
inline const TorchDtype& float32_dtype() {
    static const TorchDtype dtype("float32");
    return dtype;
}
inline const TorchDtype& int64_dtype() {
    static const TorchDtype dtype("int64");
    return dtype;
}
inline const TorchDtype& int32_dtype() {
    static const TorchDtype dtype("int32");
    return dtype;
}
inline const TorchDtype& uint8_dtype() {
    static const TorchDtype dtype("uint8");
    return dtype;
}

namespace tensor_detail {

inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

inline int64_t call_integer(const py::handle& tensor, PyObject* method) {
    const auto result = py::reinterpret_steal<py::object>(
        PyObject_CallMethodNoArgs(tensor.ptr(), method));
    if (!result) throw py::error_already_set();
    const int64_t value = PyLong_AsLongLong(result.ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

inline py::object attribute(const py::handle& tensor, PyObject* name) {
    auto result = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name));
    if (!result) throw py::error_already_set();
    return result;
}

inline std::string describe(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

}  // namespace tensor_detail

// Returns where a contiguous CUDA tensor of this dtype and shape lies. Throws std::invalid_argument,
// which is a ValueError in Python, that names the tensor, what it must be and what it is.
inline uintptr_t checked_address(const char* name, const py::handle& tensor,
                                 const TorchDtype& dtype, const std::vector<int64_t>& shape) {
    using namespace tensor_detail;
    static PyObject* const kShape = interned("shape");
    static PyObject* const kDtype = interned("dtype");
    static PyObject* const kDataPtr = interned("data_ptr");
    static PyObject* const kIsContiguous = interned("is_contiguous");
    static PyObject* const kGetDevice = interned("get_device");
    const py::object sizes = attribute(tensor, kShape), found = attribute(tensor, kDtype);
    bool fits = dtype.is(found) && PyTuple_GET_SIZE(sizes.ptr()) == Py_ssize_t(shape.size());
    for (size_t i = 0; fits && i < shape.size(); ++i) {
        fits = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i)) == shape[i];
    }
    fits = fits && call_integer(tensor, kIsContiguous) && call_integer(tensor, kGetDevice) >= 0;
    if (!fits) {
        throw std::invalid_argument(std::string(name) + " must be contiguous " + dtype.name() +
                                    " " + describe(shape) + " on a CUDA device, got " +
                                    std::string(py::str(found)) + " " +
                                    std::string(py::str(sizes)));
    }
    return call_integer(tensor, kDataPtr);
}

// The same, or 0 for None.
inline uintptr_t checked_address_or_null(const char* name, const py::handle& tensor,
                                         const TorchDtype& dtype,
                                         const std::vector<int64_t>& shape) {
    return tensor.is_none() ? 0 : checked_address(name, tensor, dtype, shape);
}

}  // namespace comet_ds
