// The table of functions that Python gets: exposed.add<&launcher>("name") adds one. bindings.cpp makes the Python
// module of it; it is another translation unit, because pybind11 alone takes longer to compile than all the kernels.
//
// In Python a pointer is a C-contiguous NumPy array of its type, written in place if it is not const, or None for a
// null pointer; half is float16, bfloat16 its bits as uint16. An enum is its number. A struct by value or by const
// reference is an array of as many bytes, in the order of its members. A cudaStream_t takes no argument.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef INPAINT_EMULATION
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#endif

namespace emulation {

// How many bytes a parameter has, and what Python passes for it.
struct Parameter {
  enum Kind { kNumber, kReadArray, kWrittenArray, kStruct, kStream } kind;
  const char* dtype;  // NumPy's name of a number or of an array's elements; null for structs
  size_t bytes;
};

struct Function {
  const char* name;
  std::vector<Parameter> parameters;
  const char* result;                                  // dtype of what it returns; null for nothing
  void (*call)(void* const* arguments, void* result);  // each argument where it lies in memory
  bool elementwise = false;  // called with arrays (or numbers) that are broadcast: see add_elementwise()
};

// All functions that module.cpp exposes, and what else the bindings need of that file.
std::vector<Function> functions();
void set_descending(bool descending);
bool is_sanitized();

#ifdef INPAINT_EMULATION

template <class T>
constexpr const char* dtype_name() {
  if (std::is_same_v<T, bool>) return "bool";
  if (std::is_same_v<T, float>) return "float32";
  if (std::is_same_v<T, double>) return "float64";
  if (std::is_same_v<T, __half>) return "float16";
  if (std::is_same_v<T, __nv_bfloat16>) return "uint16";
  if constexpr (std::is_integral_v<T>) {
    constexpr const char* kNames[2][4] = {{"uint8", "uint16", "uint32", "uint64"}, {"int8", "int16", "int32", "int64"}};
    return kNames[std::is_signed_v<T>][sizeof(T) == 1 ? 0 : sizeof(T) == 2 ? 1 : sizeof(T) == 4 ? 2 : 3];
  }
  return nullptr;
}

template <class P>
constexpr Parameter parameter() {
  static_assert(std::is_trivially_copyable_v<P>, "a launcher takes numbers, pointers, enums and plain structs");
  if constexpr (std::is_same_v<P, cudaStream_t>) {
    return {Parameter::kStream, nullptr, sizeof(P)};
  } else if constexpr (std::is_pointer_v<P>) {
    using T = std::remove_pointer_t<P>;
    const auto kind = std::is_const_v<T> ? Parameter::kReadArray : Parameter::kWrittenArray;
    return {kind, dtype_name<std::remove_const_t<T>>(), sizeof(P)};
  } else if constexpr (std::is_enum_v<P>) {
    return {Parameter::kNumber, dtype_name<std::underlying_type_t<P>>(), sizeof(P)};
  } else {
    return {std::is_arithmetic_v<P> ? Parameter::kNumber : Parameter::kStruct, dtype_name<P>(), sizeof(P)};
  }
}

template <auto function, class R, class... P, size_t... I>
void call_with(R (*)(P...), void* const* arguments, [[maybe_unused]] void* result, std::index_sequence<I...>) {
  if constexpr (std::is_void_v<R>)
    function(*static_cast<std::decay_t<P>*>(arguments[I])...);
  else
    *static_cast<R*>(result) = function(*static_cast<std::decay_t<P>*>(arguments[I])...);
}

template <auto function, class R, class... P>
Function describe(const char* name, R (*)(P...)) {
  const char* result = nullptr;
  if constexpr (!std::is_void_v<R>) result = dtype_name<R>();
  return {name, {parameter<std::decay_t<P>>()...}, result, [](void* const* arguments, void* result) {
            call_with<function>(function, arguments, result, std::index_sequence_for<P...>{});
          }};
}

// Collects what module.cpp exposes.
class Exposed {
 public:
  template <auto launcher>
  void add(const char* name) {
    functions_.push_back(describe<launcher>(name, launcher));
  }
  // A function of numbers that returns one, as a NumPy function: its arguments are broadcast.
  template <auto function>
  void add_elementwise(const char* name) {
    add<function>(name);
    functions_.back().elementwise = true;
  }
  std::vector<Function> functions() const { return functions_; }

 private:
  std::vector<Function> functions_;
};

#endif  // INPAINT_EMULATION

}  // namespace emulation
