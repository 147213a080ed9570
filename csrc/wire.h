// How arguments cross from Python to a kernel: pointers as integers (tensor.data_ptr()), everything
// else as itself.
#pragma once

#include <cstdint>

namespace foveate {

template <typename T>
struct Wire {
  using type = T;
  static T unpack(T value) { return value; }
};

template <typename T>
struct Wire<T*> {
  using type = std::uintptr_t;
  static T* unpack(std::uintptr_t address) { return reinterpret_cast<T*>(address); }
};

}  // namespace foveate
