// The Python module inpaint_emulation: makes functions of the table that module.cpp fills.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>

#include "launchers.h"

namespace {

using emulation::Function;
using emulation::Parameter;
namespace py = pybind11;

std::string text_of(py::handle object) { return py::str(object).cast<std::string>(); }

py::array contiguous_array(py::handle object) {
  if (!py::isinstance<py::array>(object))
    throw py::type_error("expected a NumPy array, got " + text_of(py::repr(object)));
  auto array = py::reinterpret_borrow<py::array>(object);
  if (!(array.flags() & py::array::c_style)) throw py::value_error("expected a C-contiguous array");
  return array;
}

size_t bytes_of(const py::array& array) { return static_cast<size_t>(array.nbytes()); }

// The object, or the integer that it is; no fraction gets lost.
py::object whole(const Parameter& parameter, py::handle object) {
  if (std::strstr(parameter.dtype, "int") == nullptr) return py::reinterpret_borrow<py::object>(object);
  PyObject* const integer = PyNumber_Index(object.ptr());
  if (integer == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(integer);
}

// One argument of a call: its value as the function takes it, and what keeps that valid.
class Argument {
 public:
  Argument(const Parameter& parameter, py::handle object) {
    value_.resize(parameter.bytes);
    switch (parameter.kind) {
      case Parameter::kNumber: {
        const py::array number = py::module_::import("numpy").attr("array")(whole(parameter, object), parameter.dtype);
        if (number.ndim() != 0) throw py::type_error("expected a number, got " + text_of(py::repr(object)));
        std::memcpy(value_.data(), number.data(), value_.size());
        break;
      }
      case Parameter::kStruct: {
        const py::array members = contiguous_array(object);
        if (bytes_of(members) != value_.size())
          throw py::value_error("expected an array of " + std::to_string(value_.size()) + " bytes, got " +
                                std::to_string(bytes_of(members)));
        std::memcpy(value_.data(), members.data(), value_.size());
        break;
      }
      case Parameter::kReadArray:
      case Parameter::kWrittenArray:
        if (!object.is_none()) take_array(parameter, object);
        break;
      case Parameter::kStream:
        break;  // null
    }
  }
  ~Argument() {
    if (copy_ != nullptr && written_) std::memcpy(array_.mutable_data(), copy_.get(), bytes_of(array_));
  }
  Argument(const Argument&) = delete;

  void* value() { return value_.data(); }

 private:
  void take_array(const Parameter& parameter, py::handle object) {
    array_ = contiguous_array(object);
    if (parameter.dtype != nullptr && !array_.dtype().equal(py::dtype(parameter.dtype)))
      throw py::type_error(std::string("expected an array of ") + parameter.dtype + ", got " + text_of(array_.dtype()));
    written_ = parameter.kind == Parameter::kWrittenArray;
    void* memory = written_ ? array_.mutable_data() : const_cast<void*>(array_.data());
    if (emulation::is_sanitized()) {
      // An allocation of exactly the array's size: NumPy may keep blocks of memory that are longer.
      copy_.reset(std::malloc(bytes_of(array_)));
      std::memcpy(copy_.get(), memory, bytes_of(array_));
      memory = copy_.get();
    }
    std::memcpy(value_.data(), &memory, sizeof(memory));
  }

  std::vector<unsigned char> value_;
  py::array array_;
  bool written_ = false;
  std::unique_ptr<void, decltype(&std::free)> copy_{nullptr, &std::free};
};

size_t python_arguments(const Function& function) {
  size_t count = 0;
  for (const Parameter& parameter : function.parameters) count += parameter.kind != Parameter::kStream;
  return count;
}

py::object call(const Function& function, const py::args& objects) {
  if (objects.size() != python_arguments(function))
    throw py::type_error("expected " + std::to_string(python_arguments(function)) + " arguments, got " +
                         std::to_string(objects.size()));
  std::deque<Argument> arguments;
  std::vector<void*> values;
  size_t next = 0;
  for (const Parameter& parameter : function.parameters) {
    arguments.emplace_back(parameter, parameter.kind == Parameter::kStream ? py::none() : py::object(objects[next++]));
    values.push_back(arguments.back().value());
  }
  if (function.result == nullptr) {
    function.call(values.data(), nullptr);
    return py::none();
  }
  py::array result(py::dtype(function.result), std::vector<py::ssize_t>{});
  function.call(values.data(), result.mutable_data());
  return result[py::tuple()];
}

py::object call_elementwise(const Function& function, const py::args& objects) {
  const py::module_ numpy = py::module_::import("numpy");
  if (objects.size() != function.parameters.size()) throw py::type_error("wrong number of arguments");
  py::list converted;
  for (size_t i = 0; i < objects.size(); ++i)
    converted.append(numpy.attr("asarray")(objects[i], function.parameters[i].dtype));
  const py::list broadcast = numpy.attr("broadcast_arrays")(*converted);
  std::vector<py::array> arrays;
  for (py::handle array : broadcast) arrays.push_back(numpy.attr("ascontiguousarray")(array));
  py::array result = numpy.attr("empty")(broadcast[0].attr("shape"), function.result);
  std::vector<void*> values(arrays.size());
  for (py::ssize_t i = 0; i < result.size(); ++i) {
    for (size_t j = 0; j < arrays.size(); ++j)
      values[j] = static_cast<unsigned char*>(const_cast<void*>(arrays[j].data())) + i * arrays[j].itemsize();
    function.call(values.data(), static_cast<unsigned char*>(result.mutable_data()) + i * result.itemsize());
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(inpaint_emulation, m) {
  m.def("set_descending", &emulation::set_descending);
  for (const Function& function : emulation::functions()) {
    m.def(function.name, [function](const py::args& objects) {
      return function.elementwise ? call_elementwise(function, objects) : call(function, objects);
    });
  }
}
